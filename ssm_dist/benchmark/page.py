"""A report: one page of Markdown about one run or many, ours and the peers'."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ssm_dist.benchmark import targets
from ssm_dist.benchmark.tables import (
    DECODE,
    ERRORS,
    LONGEST,
    PREFILL,
    REQUESTS,
    SCALING,
    TARGETS,
    Row,
    case_name,
    get,
    label,
    rows_of,
    table,
)

SOURCES: dict[str, Callable[[Row], Any]] = {
    "system": get("system"),
    "version": get("version"),
    "commit": get("commit"),
    "date": get("date"),
    "hardware": get("environment", "hardware"),
    "torch": get("environment", "torch"),
    "command, or how it was measured": lambda run: run.get("quoted") or f"`{run.get('command')}`",
}

SECTIONS = (
    ("Decode", targets.DECODE, DECODE),
    ("Prefill", targets.PREFILL, PREFILL),
    ("Requests", targets.REQUESTS, REQUESTS),
)

NOTES = """A case BxP+G is B prompts of P random tokens that arrive together, with G new tokens each; times
are medians, ± is the distance between the fastest and the slowest repeat. Floors and kernel times are of one
GPU: weights and states at the bandwidth of a large copy, products at the rate of a large one, the scan's
special functions. The gap is what a step takes beyond its kernels, below zero where profiling slowed them.
MHz and W are rank 0's GPU's meanwhile, W in runs of two seconds and more; where its power is capped, the
clock is below that of the floors.
× 1 GPU is against our own figure, × best peer against the best other system on as many GPUs. Systems marked
as quoted did not run on this machine: ratios to them are no measurements.
"""

NO_PLOTS = "Plots are left out: matplotlib is not installed (`pip install ssm-dist[benchmark]`).\n"


def page(documents: Sequence[dict[str, Any]], folder: Path | None) -> str:
    """The report of all documents; with a folder, plots are drawn there and shown, and kernels listed."""
    rows = [row | {"times": _times(row, rows)} for rows in [rows_of(documents)] for row in rows]
    parts = ["# Benchmark", "", table(SOURCES, documents), NOTES]
    drawn = folder is not None and importlib.util.find_spec("matplotlib") is not None
    if folder is not None and not drawn:
        parts.append(NO_PLOTS)
    for model in dict.fromkeys(row["model"] for row in rows if not row["quoted"]):
        parts += [f"## {model}", "", *_against_targets(model, rows)]
        mine = [row for row in rows if row["model"] == model]
        if folder is not None and drawn:
            from ssm_dist.benchmark.plots import draw

            roofs = [document["environment"].get("ceilings") for document in documents]
            parts += [f"![{title}]({name})\n" for title, name in draw(model, mine, roofs, folder)]
        parts += _of_model(mine) + (_longest(mine) if folder is not None else [])
    return "\n".join(parts).rstrip() + "\n"


def _times(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """By measure, how many times better one of our rows is than on one GPU, and than the best peer."""
    found: dict[str, Any] = {}
    for measure in targets.MEASURES if row["system"] == "ssm-dist" else ():
        if row.get(measure.name) is None:
            continue
        one, peer = targets.on_one_gpu(row, rows), targets.best_peer(row, measure, rows)
        others = {"one": one if row["degree"] > 1 else None, "peer": peer}
        found[measure.name] = {
            name: round(measure.better(row[measure.name], other[measure.name]), 2)
            for name, other in others.items()
            if other is not None and other.get(measure.name) is not None
        }
    return found


def _against_targets(model: str, rows: Sequence[Row]) -> list[str]:
    met = [found for found in targets.compared(rows) if found["model"] == model]
    times = [found for found in targets.scaled(rows) if found["model"] == model]
    parts = [f"### Targets, set for {targets.HARDWARE} GPUs", "", table(TARGETS, met)] if met else []
    return parts + (["### Scaling of requests", "", table(SCALING, times)] if times else [])


def _of_model(rows: list[Row]) -> list[str]:
    parts = []
    for title, measure, columns in SECTIONS:
        shown = [row for row in rows if row.get(measure.name) is not None]
        if shown:
            parts += [f"### {title}", "", table(columns, sorted(shown, key=_order))]
    failed = [row for row in rows if "error" in row]
    if failed:
        parts += ["### Cases that did not run", "", table(ERRORS, failed)]
    return parts


def _longest(rows: list[Row]) -> list[str]:
    """The kernels that take longest, case by case, folded up."""
    parts = []
    for row in rows:
        for step in ("prefill", "decode"):
            longest = get(f"{step}_breakdown", "longest")(row)
            if longest:
                title = f"Longest in {step}: {case_name(row)}, {label(row)}, degree {row['degree']}"
                parts.append(
                    f"<details><summary>{title}</summary>\n\n{table(LONGEST, longest)}\n</details>\n"
                )
    return parts


def _order(row: Row) -> tuple[Any, ...]:
    return row["batch"], row["prompt_tokens"], row["degree"], row["new_tokens"], label(row)
