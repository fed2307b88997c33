"""What a codec in the reductions costs a trained model, against the exact reductions, on held-out text.

    python benchmarks/reduction_fidelity.py --out benchmarks/reduction_fidelity
    python benchmarks/reduction_fidelity.py --out OUT --checkpoint FOLDER --name NAME

The text is that of the demo checkpoints' validation: files of Python's standard library that
`checkpoints/train.py` never trains on. For each checkpoint, degree and codec: perplexity over windows of
--window tokens, each from an empty state, with the standard error of its change, had the windows been drawn
anew; the mean and the largest Kullback-Leibler divergence of a token's distribution from the exact one's; how
many tokens of greedy answers agree with the exact model's before the first that does not. Every reduction of
a branch is quantised, those of decoding too, which `auto` would send as they are: so the answers are worse
than those of a served model. "split": the residual stream stays split by rows, and what is sent last is the
normed stream, as for long messages over shared memory. "fed back": with error feedback. One rank a GPU, or
CPU ranks where there are too few.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ssm_dist import LLM, SamplingParams
from ssm_dist.parallel import styles
from ssm_dist.provenance import command, commit
from ssm_dist.ranks import close_ranks
from ssm_dist.scheduler import Chunk, Sequence
from ssm_dist.version import __version__

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "checkpoints"))

DEMOS = [ROOT / "checkpoints" / f"{name}-tiny-python" for name in ("mamba", "falcon-mamba", "zamba")]


class Way(NamedTuple):
    """How the branches' sums travel."""

    codec: str
    group_size: int
    split: bool = False
    """The residual stream is split by rows."""
    feedback: bool = False

    def __str__(self) -> str:
        sizes = self.codec if self.codec == "none" else f"{self.codec}/{self.group_size}"
        return sizes + ", split" * self.split + ", fed back" * self.feedback


EXACT = Way("none", 128)
QUANTISED = [Way("int8", 128), Way("int8", 32), Way("fp8", 128), Way("int4", 32)]
SPLIT = [way._replace(split=True) for way in QUANTISED if way != Way("int8", 32)]
WAYS = [EXACT, *QUANTISED, *(way._replace(feedback=True) for way in QUANTISED), *SPLIT]
GOALS = {"int8": 0.1, "fp8": 0.5, "int4": 2.0}
"""Largest change of the perplexity, per cent."""


class Measured:
    """One model with one kind of reduction: logits of the windows, and greedy answers."""

    def __init__(self, folder: Path, way: Way, options: argparse.Namespace) -> None:
        styles.splits_residual = lambda branch, *_: way.split and len(branch) >= dist.get_world_size()
        reduction = {"codec": way.codec, "group_size": way.group_size, "feedback": way.feedback}
        reduction["algorithm"] = "all_reduce" if way.codec == "none" else "exchange"
        prompts = max(1, options.tokens // options.window)
        llm = LLM.from_pretrained(
            folder,
            model={"dtype": options.dtype},
            reduction=reduction,
            cache={"max_sequences": prompts, "max_tokens": prompts * (options.window + options.answer)},
            prefill={"chunk_tokens": options.window},
            compile={"mode": "none"},
        )
        self.parameters = _parameters(folder)
        windows = _windows(llm, options)
        self.targets = windows[:, 1:]
        self.logits = torch.stack([_logits(llm, window.tolist()) for window in windows])
        beginnings = [window[: options.window // 4].tolist() for window in windows[: options.answers]]
        params = SamplingParams(max_new_tokens=options.answer, temperature=0.0, ignore_eos=True)
        self.answers = [completion.token_ids for completion in llm.generate(beginnings, params)]

    @property
    def scores(self) -> Tensor:
        """(windows, window) log-probabilities of the windows' tokens but the first, float64."""
        return self.logits.log_softmax(-1).gather(-1, self.targets[..., None])[..., 0].double()

    @property
    def perplexity(self) -> float:
        """Of all of them."""
        return math.exp(-float(self.scores.mean()))

    def against(self, exact: Measured) -> dict[str, Any]:
        """What changed."""
        p, q = exact.logits.log_softmax(-1), self.logits.log_softmax(-1)
        divergence = (p.exp() * (p - q)).double().sum(-1)
        matches = [
            next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), len(theirs))
            for mine, theirs in zip(self.answers, exact.answers, strict=True)
        ]
        lost = (exact.scores - self.scores).mean(1)  # neighbours' errors come from one state
        return {
            "perplexity": round(self.perplexity, 4),
            "change, %": round(100 * math.expm1(float(lost.mean())), 4),
            "+-": round(100 * float(lost.std()) / math.sqrt(len(lost)), 4),
            "mean KL, nats": float(f"{float(divergence.mean()):.2e}"),
            "largest KL": float(f"{float(divergence.max()):.2e}"),
            "same first token, %": round(100 * float((p.argmax(-1) == q.argmax(-1)).double().mean()), 2),
            "greedy match, mean": round(sum(matches) / len(matches), 1),
            "greedy match, all": f"{sum(m == len(exact.answers[0]) for m in matches)} of {len(matches)}",
        }


def _can_split(folder: Path) -> bool:
    """Whether only norms read the residual stream: not so in hybrid models."""
    return "zamba" not in json.loads((folder / "config.json").read_text())["model_type"]


def _parameters(folder: Path) -> int:
    from safetensors import safe_open

    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            count += sum(math.prod(stored.get_slice(key).get_shape()) for key in stored.keys())  # noqa: SIM118
    return count


def _windows(llm: LLM, options: argparse.Namespace) -> Tensor:
    """(windows, window + 1) token ids from the starts of held-out files, all long enough ones in turn."""
    from corpus import held_out, standard_library

    assert llm.tokenizer is not None
    rows: list[list[int]] = []
    files = [llm.tokenizer.encode(text) for path, text in standard_library().items() if held_out(path)]
    for start in range(0, max(map(len, files)), options.window):
        rows += [f[start : start + options.window + 1] for f in files if len(f) > start + options.window]
    count = max(1, options.tokens // options.window)
    if len(rows) < count:
        raise SystemExit(f"error: the held-out files give {len(rows)} windows, fewer than {count}")
    return torch.tensor(rows[:count])


@torch.inference_mode()
def _logits(llm: LLM, token_ids: list[int]) -> Tensor:
    """(T - 1, V) after each token but the last, float32, on the CPU."""
    sequence = Sequence(0, token_ids, SamplingParams())
    slot = llm.cache.acquire(len(token_ids))
    assert slot is not None
    sequence.slot = slot
    hidden = llm.engine.hidden([Chunk(sequence, 0, len(token_ids) - 1)])
    logits: Tensor = llm.model.head(hidden)
    llm.cache.release(slot)
    return logits[:, : llm.loaded.config.vocab_size].float().cpu()


def measure(options: argparse.Namespace) -> None:
    """One rank's part: every checkpoint and codec at the degree that torchrun started."""
    rows: list[dict[str, Any]] = []
    for folder in options.checkpoint:
        exact: Measured | None = None
        for way in WAYS:
            if str(way) not in options.ways or (way.split and not _can_split(folder)):
                continue
            measured = Measured(folder, way, options)
            exact = exact or measured
            row = {
                "checkpoint": options.name or folder.name, "parameters": measured.parameters,
                "degree": dist.get_world_size(), "codec": str(way), **measured.against(exact),
            }  # fmt: skip
            rows.append(row)
            if dist.get_rank() == 0:
                print(json.dumps(row), flush=True)
                options.rows.write_text(json.dumps(rows))
            gc.collect()
    close_ranks()


def launch(options: argparse.Namespace) -> None:
    """Run `measure` under torchrun for each degree; write report.json and report.md."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for degree in options.degrees:
            file = Path(folder, f"{degree}.json")
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            words = [str(degree), str(Path(__file__).resolve()), *sys.argv[1:], "--rows", str(file)]
            subprocess.run([*launcher, *words], check=True)
            rows += json.loads(file.read_text())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
    about = (
        f"{gpu}; ssm-dist {__version__}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"{options.tokens} tokens in windows of {options.window}, {options.dtype}; "
        f"{options.answers} greedy answers of {options.answer} tokens"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    called = command("python benchmarks/reduction_fidelity.py", sys.argv[1:])
    report = {"about": about, "commit": commit(), "command": called, "goals, %": GOALS, "rows": rows}
    (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "report.md").write_text(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    rows = report["rows"]
    lines = ["# Fidelity of the quantised reductions", "", report["about"], ""]
    lines += [f"`{report['command']}` at commit {report['commit']}", ""]
    lines += ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    above = [
        f"{row['checkpoint']} at degree {row['degree']}, {row['codec']} ({row['change, %']:+.3f} %)"
        for row in rows
        if row["change, %"] > GOALS.get(row["codec"].partition("/")[0], math.inf)
    ]
    goals = ", ".join(f"{codec} {goal} %" for codec, goal in GOALS.items())
    lines += ["", f"Goals for the perplexity: {goals}. Above them: {'; '.join(above) or 'none'}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Launch, or take part under torchrun."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of report.json and report.md")
    parser.add_argument("--checkpoint", type=Path, nargs="+", default=DEMOS, help="folders; the demo ones")
    parser.add_argument("--name", help="of the checkpoint in the report, for a single one")
    parser.add_argument("--degrees", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--answer", type=int, default=128, help="tokens of an answer")
    names = [str(way) for way in WAYS]
    parser.add_argument("--ways", nargs="+", choices=names, default=names, help="the first is needed; all")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "RANK" in os.environ:
        measure(options)
    else:
        launch(options)


if __name__ == "__main__":
    main()
