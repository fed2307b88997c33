"""Layers of 17 to 64 rows by configuration: the first part of `decode_kernels`."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from benchmarks.decode_candidates import DEALT
from ssm_dist import kernels
from ssm_dist.kernel_benchmark.cases import Case
from ssm_dist.kernel_benchmark.clock import Call, Clock
from ssm_dist.kernel_benchmark.precompile import precompile
from ssm_dist.kernel_benchmark.program import table
from ssm_dist.kernels import tuning

SHAPES = [(10240, 2560), (2560, 5120), (5120, 2560), (2560, 2560), (16384, 4096), (4096, 8192)]
"""(N, K) of in_proj and out_proj: mamba-2.8b, a half of it, falcon-mamba-7b."""
ROWS = (64, 32)
WEIGHTS = 200e6
"""Bytes of weights in a graph at least: more than the L2 cache holds."""


@dataclasses.dataclass(frozen=True)
class Candidate(Case):
    """A product by one configuration."""

    config: tuning.Configuration = dataclasses.field(default_factory=dict)

    def run(self, arguments: list[Any]) -> Any:
        """By that configuration, whatever the tuning table says."""
        with tuning.forced(f"linear_{self.sequences}", self.config):
            return super().run(arguments)


def compile_candidates() -> None:
    """All of them, before this process uses its GPU."""

    def case(rows: int, config: tuning.Configuration) -> Candidate:
        def make(device: torch.device) -> list[Any]:
            x, weight = (
                torch.randn(n, SHAPES[0][1], device=device, dtype=torch.bfloat16)
                for n in (rows, SHAPES[0][0])
            )
            return [x, weight]

        return Candidate("linear", "", 1, rows, 1, SHAPES[0][0], make, 0, config=config)

    precompile([case(rows, config) for rows in ROWS for config in DEALT.values()])


def dealt_rows(clock: Clock, copy: float, deadline: float) -> Iterator[dict[str, Any]]:
    """Microseconds of a call by candidate, of each shape and number of rows, until the deadline.

    In a graph of calls on so many weights that the L2 cache holds none of them.
    """
    for columns, width in SHAPES:
        count = max(2, round(WEIGHTS / (2 * columns * width)))
        weights = [torch.randn((columns, width), device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        for rows in ROWS:
            if time.monotonic() > deadline:
                print(f"left out: {(columns, width)}, {rows} rows", file=sys.stderr)
                continue
            yield {
                "N": columns, "K": width, "rows": rows, "floor": 1e6 * weights[0].nbytes / copy,
                **_by_candidate(rows, clock, weights),
            }  # fmt: skip


def _by_candidate(rows: int, clock: Clock, weights: list[Tensor]) -> dict[str, float]:
    x = torch.randn(rows, weights[0].shape[1], device="cuda", dtype=torch.bfloat16)
    calls: list[Call] = [functools.partial(kernels.linear, x, weight) for weight in weights]
    found = {"torch": 1e6 * clock.seconds([functools.partial(F.linear, x, weight) for weight in weights])}
    for name, config in DEALT.items():
        try:
            with tuning.forced(f"linear_{rows}", config):
                found[name] = 1e6 * clock.seconds(calls)
        except Exception as error:  # e.g. more shared memory than there is
            print(f"{name}, {rows} rows, {tuple(weights[0].shape)}: {error}", file=sys.stderr)
    return found


def tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    """The best candidate of each shape, then all candidates of all shapes."""
    best = [{**row, "best": min((k for k in DEALT if k in row), key=row.__getitem__)} for row in rows]
    yield table(
        [{**row, "us": row[row["best"]], "of_floor": row["floor"] / row[row["best"]]} for row in best],
        "Layers of 17 to 64 rows, us",
        {
            "N": "d",
            "K": "d",
            "rows": "d",
            "floor": ".1f",
            "torch": ".1f",
            "us": ".1f",
            "of_floor": ".0%",
            "best": "",
        },
    )
    shapes = {f"{row['rows']}: {row['N']} {row['K']}": row for row in rows}
    yield table(
        [
            {"candidate": kind, **{name: row[kind] for name, row in shapes.items() if kind in row}}
            for kind in ("floor", "torch", *DEALT)
        ],
        "The same by candidate",
        {"candidate": "", **dict.fromkeys(shapes, ".1f")},
    )
