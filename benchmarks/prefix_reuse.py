"""What a known prefix saves: time to first token cold and warm, and a conversation with and without reuse.

    python benchmarks/prefix_reuse.py --preset mamba-2.8b --out benchmarks/prefix_reuse
    torchrun --standalone --nproc-per-node 2 benchmarks/prefix_reuse.py --preset falcon-mamba-7b --out ...

Prompts are random tokens. Cold: nothing is known. Warm: everything but the last `--fresh` tokens is. The
conversation answers 32 tokens a turn, and every turn's prompt is all that was said and 64 tokens more.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from ssm_dist import LLM, SamplingParams
from ssm_dist.config import Config

ANSWER = SamplingParams(max_new_tokens=32, ignore_eos=True)
FIRST = SamplingParams(max_new_tokens=1, ignore_eos=True)


def load(options: argparse.Namespace, *, reuse: bool) -> LLM:
    """The model, with or without reuse."""
    cache = {"max_sequences": 1, "max_tokens": 2 * options.tokens, "prefix_interval": options.interval}
    budget = {"prefix_device_bytes": 4 << 30} if reuse else {}
    degree = int(os.environ.get("WORLD_SIZE", "1"))
    sections: dict[str, Any] = {
        "model": {"preset": options.preset},
        "parallel": {"tensor": degree},
        "cache": cache | budget,
        "prefill": {"chunk_tokens": options.interval},
    }
    return LLM.from_config(Config.model_validate(sections))


def first_token(llm: LLM, prompt: list[int]) -> float:
    """Milliseconds to the first token."""
    seconds = llm.generate([prompt], FIRST)[0].seconds_to_first_token
    assert seconds is not None
    return seconds * 1e3


def cold_and_warm(llm: LLM, options: argparse.Namespace) -> dict[str, float]:
    """Medians over several prompts, the first of which warms up."""
    cold, warm = [], []
    for seed in range(options.repeats + 1):
        ids = random.Random(seed).choices(range(1, 500), k=options.tokens)
        cold.append(first_token(llm, ids[: -options.fresh]))
        warm.append(first_token(llm, ids))
    slow, fast = statistics.median(cold[1:]), statistics.median(warm[1:])
    return {"cold ms": round(slow, 2), "warm ms": round(fast, 2), "times faster": round(slow / fast, 1)}


def conversation(llm: LLM, options: argparse.Namespace) -> list[float]:
    """Milliseconds to the first token, turn by turn."""
    draw, history, times = random.Random(99), list[int](), []
    for turn in range(options.turns):
        history = history + draw.choices(range(1, 500), k=options.tokens // 8 if turn == 0 else 64)
        completion = llm.generate([history], ANSWER)[0]
        times.append(round((completion.seconds_to_first_token or 0.0) * 1e3, 2))
        history = history + completion.token_ids
    return times


def main() -> None:
    """Write NAME.json into --out, and print it as the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="mamba-2.8b")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--fresh", type=int, default=64)
    parser.add_argument("--interval", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--turns", type=int, default=20)
    options = parser.parse_args()
    with_reuse = load(options, reuse=True)
    result: dict[str, Any] = {
        "command": f"benchmarks/prefix_reuse.py {' '.join(sys.argv[1:])}",
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "ranks": with_reuse.config.parallel.tensor,
        "torch": torch.__version__,
        **cold_and_warm(with_reuse, options),
        "conversation with reuse, ms": conversation(with_reuse, options),
        "counters": vars(with_reuse.prefixes.counters),
    }
    del with_reuse
    result["conversation without, ms"] = conversation(load(options, reuse=False), options)
    if os.environ.get("RANK", "0") == "0":
        options.out.mkdir(parents=True, exist_ok=True)
        name = f"{options.preset}_tp{result['ranks']}.json"
        (options.out / name).write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result))


if __name__ == "__main__":
    main()
