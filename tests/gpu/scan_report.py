"""The report of `bench_scan`: for each shape the chosen form, against mamba-ssm's scan in the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.joined_report import join

COLUMNS = {
    "sequences x tokens x channels": "case",
    "floor, ms": "floor",
    "mamba-ssm, ms": "peer",
    "chosen form": "form",
    "ms": "ms",
    "of mamba-ssm's speed": "speedup",
    "of the floor": "times_floor",
    "fastest form measured": "fastest",
    "its ms": "fastest_ms",
    "y, against float64": "y",
    "state": "state",
}
INTRODUCTION = """# The selective scan, by shape

bfloat16, 16 states, one group of B and C. The floor is that of the special functions: 19 operations a channel
and token at 16 a clock and multiprocessor, 132 of them at 1.98 GHz. mamba-ssm's CUDA scan (2.3.2) is measured
in the same run, on the layout that it wants. A form is a chunk's tokens (0: whole sequences), warps a block,
groups of tokens ahead in registers, exponentials of every 16 by polynomial, tiles in shared memory, registers
(0: the compiler's choice), and tokens that first chunks are shorter by. The chosen form is what
`ssm_dist/kernels/gluon_form.py` took when this was written; the JSON beside this page has all that were
measured. Times are medians of CUDA graphs that rotate over inputs larger than the L2 cache. Every form is
checked against float64 and for equal bits when run again. Made by `tests/gpu/bench_scan.py`."""


def report(
    folder: Path, rows: Sequence[dict[str, Any]], chosen: Mapping[str, str], around: Mapping[str, Any]
) -> None:
    """Add a run for each shape whose chosen form (by "8x8192x5120") was measured; around: `circumstances`."""
    for case, name in chosen.items():
        measured = [row for row in rows if case == "x".join(map(str, row["shape"])) and row["good"]]
        mine = next((row for row in measured if row["form"] == name), None)
        if mine is None:
            continue
        best = min(measured, key=lambda row: float(row["ms"]))
        peer, floor = mine["mamba_ssm_ms"], mine["floor_ms"]
        run = {
            "case": case.replace("x", " x "),
            "degree": 1,
            "floor": f"{floor:.3f}",
            "peer": f"{peer:.3f}" if peer else "-",
            "form": name.removeprefix("gluon "),
            "ms": f"{mine['ms']:.4f}",
            "speedup": f"{peer / mine['ms']:.2f}x" if peer else "-",
            "times_floor": f"{mine['ms'] / floor:.2f}x",
            "fastest": best["form"].removeprefix("gluon "),
            "fastest_ms": f"{best['ms']:.4f}",
            "y": f"{mine['y']:.1e}",
            "state": f"{mine['state']:.1e}",
            "forms": {row["form"].removeprefix("gluon "): row["ms"] for row in measured},
        }
        join(folder, run | dict(around), COLUMNS, INTRODUCTION)
