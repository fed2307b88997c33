"""`ssm-dist plan`: what a plan does to a model at a degree, without weights, GPUs or ranks."""

from __future__ import annotations

import re
import sys
from collections import Counter

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ssm_dist.build import build_meta, open_source
from ssm_dist.config import Config
from ssm_dist.parallel import ParameterPlacement, ResolvedPlan, resolve_plan
from ssm_dist.report import size

PLANNED_FOR = "cuda"
"""Whatever this host has: what is planned here most often runs elsewhere, on GPUs."""


def run(config: Config) -> None:
    """Print the placements and reductions of [model] at [parallel] tensor, in one process."""
    source = open_source(config, PLANNED_FOR)
    plan = resolve_plan(build_meta(source), source.spec.plan, config.parallel.tensor)
    # paths must not be cut off where the output is not a terminal
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(_parameters(plan, config.parallel.tensor))
    console.print(_reductions(plan) if plan.reductions else "Reductions: none (one rank)\n")
    total = sum(p.local_bytes for p in plan.parameters)
    console.print(f"weights a rank: {size(total)}")
    if config.model.preset is not None and config.model.dtype == "auto":
        console.print("on GPUs, where a preset is bfloat16; on a CPU it is float32 (--model.dtype float32)")


def _parameters(plan: ResolvedPlan, degree: int) -> Table:
    """One row for all layers that are alike."""
    groups: dict[tuple[object, ...], list[ParameterPlacement]] = {}
    for p in plan.parameters:
        groups.setdefault((_pattern(p.path), p.shape, p.dim, p.dtype), []).append(p)
    table = Table(title=f"Parameters at degree {degree}", title_justify="left", box=SIMPLE)
    for column in ("parameter", "count", "shape", "dtype", "placement", "shape a rank", "bytes a rank"):
        table.add_column(column, justify="right" if column in ("count", "bytes a rank") else "left")
    for (path, *_), alike in groups.items():
        first = alike[0]
        placement = "Replicate()" if first.dim is None else f"Shard({first.dim})"
        table.add_row(
            str(path), str(len(alike)), _shape(first.shape), str(first.dtype)[6:], placement,
            _shape(first.local_shape), size(len(alike) * first.local_bytes),
        )  # fmt: skip
    return table


def _reductions(plan: ResolvedPlan) -> Table:
    table = Table(title="Reductions", title_justify="left", box=SIMPLE)
    for column in ("module", "count", "what", "numbers a token", "ranks"):
        table.add_column(
            column, justify="right" if column in ("count", "numbers a token", "ranks") else "left"
        )
    counted = Counter((_pattern(path), r.kind, r.width, r.ranks) for path, r in plan.reductions.items())
    for (path, kind, width, ranks), count in counted.items():
        table.add_row(path, str(count), kind, str(width), str(ranks))
    return table


def _pattern(path: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", path)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
