"""How far a state of fewer bits drifts: perplexity and logits by state dtype, over a long decode.

    python benchmarks/state_drift.py --out benchmarks/state_drift

A file of the standard library is decoded token by token (teacher-forced) by each demo checkpoint, with
weights and activations in float32, once for every dtype of the scan's state. The relative error of a token's
logits is |logits - logits32| / |logits32|, Euclidean, logits32 being those of the float32 state.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssm_dist import LLM, SamplingParams
from ssm_dist.provenance import command, commit
from ssm_dist.scheduler import Chunk, Sequence
from ssm_dist.text import Tokenizer

CHECKPOINTS = ["mamba-tiny-python", "falcon-mamba-tiny-python", "zamba-tiny-python"]
DTYPES = ["float32", "bfloat16", "float16"]
WINDOWS = [(0, 256), (256, 1024), (1024, 2048), (2048, 4096)]


class Decoder:
    """One model with one dtype of state, decoding given tokens."""

    def __init__(self, folder: Path, state_dtype: str, token_ids: list[int]) -> None:
        self.llm = LLM.from_pretrained(
            folder,
            model={"dtype": "float32"},
            cache={"max_sequences": 1, "max_tokens": len(token_ids), "state_dtype": state_dtype},
        )
        self._sequence = Sequence(0, token_ids, SamplingParams())
        self._sequence.slot = self.llm.cache.acquire(len(token_ids)) or 0

    def step(self, position: int) -> Tensor:
        """Logits (V,) after the token there."""
        hidden = self.llm.engine.hidden([Chunk(self._sequence, position, 1)])
        return self.llm.model.head(hidden)[0, : self.llm.loaded.config.vocab_size].float()


@torch.inference_mode()
def measure(folder: Path, text: str, count: int) -> list[dict[str, Any]]:
    """One row a dtype."""
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    ids = tokenizer.encode(text)[: count + 1]
    assert len(ids) == count + 1, f"the text has {len(ids)} tokens; {count + 1} are needed"
    decoders = {dtype: Decoder(folder, dtype, ids) for dtype in DTYPES}
    errors: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    losses = dict.fromkeys(DTYPES, 0.0)
    for position in range(count):
        logits = {dtype: d.step(position) for dtype, d in decoders.items()}
        for dtype, row in logits.items():
            errors[dtype].append(float((row - logits["float32"]).norm() / logits["float32"].norm()))
            losses[dtype] -= float(row.log_softmax(-1)[ids[position + 1]])
    return [
        {
            "checkpoint": folder.name,
            "state": dtype,
            "perplexity": round(math.exp(losses[dtype] / count), 5),
            **{f"error {a}-{b}": f"{_mean(errors[dtype][a:b]):.2e}" for a, b in WINDOWS if b <= count},
            "largest error": f"{max(errors[dtype]):.2e}",
        }
        for dtype in DTYPES
    ]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    """Write report.md and report.json into --out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--text", default="argparse.py", help="a file of the standard library")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    text = (Path(os.__file__).parent / options.text).read_text(encoding="utf-8")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
    about = f"{device}; torch {torch.__version__}, Python {platform.python_version()}, {options.text}"
    made_of = commit()
    called = command("python benchmarks/state_drift.py", sys.argv[1:])
    rows: list[dict[str, Any]] = []
    for name in CHECKPOINTS:
        rows += measure(Path("checkpoints") / name, text, options.tokens)
        print(json.dumps(rows[-len(DTYPES) :]), flush=True)
    report = {"hardware": about, "commit": made_of, "command": called, "rows": rows}
    (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    table = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    table += ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    (options.out / "report.md").write_text(
        "\n".join([about, "", f"`{called}` at commit {made_of}", "", *table, ""])
    )


if __name__ == "__main__":
    main()
