"""Run the demo and the released models' real shapes at several degrees; write a table and JSON.

    python benchmarks/foundation.py --out benchmarks/foundation --degrees 1 2

Every case is the committed configuration, started as a user starts it; the weights of the 2.8B and 7B models
are random. It shows that the cases run, and what they take without compiled steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

CASES = ["demo", "mamba_2.8b_tp{}", "falcon_mamba_7b_tp{}", "zamba_7b_tp{}"]
COLUMNS = {
    "case": "case", "degree": "degree", "start-up s": "startup", "time to first token ms": "ttft",
    "ms a step": "step", "tokens/s": "rate", "weights a rank": "weights a rank",
    "state a rank": "state a rank", "kernels": "kernels", "reductions": "reductions",
}  # fmt: skip


def run(case: str, degree: int, seconds: float, extra: list[str]) -> dict[str, Any]:
    """One run of infer.py; its table and its output file."""
    name = case.format(degree)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.jsonl"
        command = [
            "torchrun", "--standalone", "--nproc-per-node", str(degree), "infer.py",
            "--config", f"configs/{name}.toml", "--parallel.tensor", str(degree), *extra,
        ]  # fmt: skip
        begin = time.perf_counter()
        done = subprocess.run(
            [*command, "--output.file", str(output)], capture_output=True, text=True, timeout=seconds
        )
        wall = time.perf_counter() - begin
        shown = " ".join(command)
        if done.returncode:
            return {"case": name, "degree": degree, "command": shown, "error": done.stderr[-2000:]}
        records = [json.loads(line) for line in output.read_text().splitlines()]
    return {
        "case": name,
        "degree": degree,
        "command": shown,
        **measures(records, wall),
        **printed(done.stdout),
    }


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
    names = ("weights a rank", "state a rank", "kernels", "reductions")
    found = {name: line for name in names for line in text.splitlines() if line.startswith(name)}
    return {name: line[len(name) :].strip() for name, line in found.items()}


def main() -> None:
    """Run every case at every degree, and write report.md and report.json into --out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--degrees", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--seconds", type=float, default=150, help="for one run")
    options, extra = parser.parse_known_args()
    options.out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    report = {
        "hardware": f"{torch.cuda.device_count()} x {gpu}",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "command": f"python benchmarks/foundation.py {' '.join(sys.argv[1:])}",
        "runs": [],
    }
    for degree in options.degrees:
        for case in options.cases:
            try:
                result = run(case, degree, options.seconds, extra)
            except subprocess.TimeoutExpired:
                result = {"case": case.format(degree), "degree": degree, "error": f"over {options.seconds} s"}
            report["runs"].append(result)
            print(json.dumps(result)[:600], flush=True)
            (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "report.md").write_text(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """The table of a report."""
    lines = [f"{report['hardware']}, {report['versions']}", "", f"`{report['command']}`", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for result in report["runs"]:
        lines.append("| " + " | ".join(str(result.get(key, "-")) for key in COLUMNS.values()) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
