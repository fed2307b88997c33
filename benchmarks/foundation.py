"""Run the demo and the released models' real shapes at several degrees; write a table and JSON.

    python benchmarks/foundation.py --out benchmarks/foundation --degrees 1 2
    python benchmarks/foundation.py --out benchmarks/foundation --degrees 1 --cases falcon_mamba_7b zamba_7b

Every case is the committed configuration, started as a user starts it; the weights of the 2.8B and 7B models
are random. It shows that the cases run, and roughly what they take. Runs of an earlier call stay in the
report unless they are repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from joined_report import circumstances, join

CONFIGS = {
    "demo": "demo", "mamba_2.8b": "mamba_2.8b_tp{}", "falcon_mamba_7b": "falcon_mamba_7b_tp{}",
    "zamba_7b": "zamba_7b_tp{}",
}  # fmt: skip
COLUMNS = {
    "case": "case", "degree": "degree", "started by": "launcher", "start-up s": "startup",
    "time to first token ms": "ttft", "ms a step": "step", "tokens/s": "rate",
    "weights a rank": "weights a rank", "state a rank": "state a rank", "kernels": "kernels",
    "steps": "steps", "reductions": "reductions",
}  # fmt: skip
INTRODUCTION = """# The committed configurations, run once each

Each row is one process group that loads the model, answers its configuration's prompts together, and ends;
the weights of the 2.8B and 7B models are random. Start-up is everything before the first request: the
interpreter, torch, the ranks, the weights. The time to the first token contains what a fresh process compiles
and loads, and a run may capture its steps meanwhile: the times say little about a warm server, which
a configuration with [benchmark] measures. Made by `benchmarks/foundation.py`."""


def run(case: str, degree: int, seconds: float, extra: list[str]) -> dict[str, Any]:
    """One run of infer.py; its table and its output file."""
    launcher = ["torchrun", "--standalone", "--nproc-per-node", str(degree)] if degree > 1 else ["python"]
    options = ["--config", f"configs/{CONFIGS[case].format(degree)}.toml", "--parallel.tensor", str(degree)]
    command = [*launcher, "infer.py", *options, *extra]
    found = {"case": case, "degree": degree, "launcher": command[0], "command": " ".join(command)}
    if degree == 1:
        command[0] = sys.executable
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.jsonl"
        begin = time.perf_counter()
        try:
            done = subprocess.run(
                [*command, "--output.file", str(output)], capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return found | {"error": f"over {seconds} s"}
        wall = time.perf_counter() - begin
        if done.returncode:
            return found | {"error": done.stderr[-2000:]}
        records = [json.loads(line) for line in output.read_text().splitlines()]
    return found | measures(records, wall) | printed(done.stdout)


def measures(records: list[dict[str, Any]], wall: float) -> dict[str, Any]:
    """Times of the requests, which all start together."""
    last = max(r["seconds"] for r in records)
    steps = [
        (r["seconds"] - r["seconds_to_first_token"]) / (len(r["token_ids"]) - 1)
        for r in records
        if len(r["token_ids"]) > 1
    ]
    return {
        "startup": round(wall - last, 1),
        "ttft": round(1e3 * statistics.median(r["seconds_to_first_token"] for r in records), 1),
        "step": round(1e3 * statistics.median(steps), 2),
        "rate": round(sum(len(r["token_ids"]) for r in records) / last, 1),
        "wall_seconds": round(wall, 1),
        "requests": [[len(r.get("prompt_token_ids", [])), len(r["token_ids"])] for r in records],
    }


def printed(text: str) -> dict[str, str]:
    """The rows of the table that infer.py prints last."""
    names = ("weights a rank", "state a rank", "kernels", "steps", "reductions")
    found = {name: line for name in names for line in text.splitlines() if line.startswith(name)}
    return {name: line[len(name) :].strip() for name, line in found.items()}


def main() -> None:
    """Run every case at every degree; after each, --out has it in report.md and report.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--degrees", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cases", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--seconds", type=float, default=150, help="for one run")
    options, extra = parser.parse_known_args()
    around = circumstances(["torch", "triton"])
    for degree in options.degrees:
        for case in options.cases:
            result = run(case, degree, options.seconds, extra) | around
            print(json.dumps(result)[:600], flush=True)
            join(options.out, result, COLUMNS, INTRODUCTION)


if __name__ == "__main__":
    main()
