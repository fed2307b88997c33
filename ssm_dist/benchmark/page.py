"""A report: one page of Markdown about one run or many, ours and the peers'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ssm_dist.benchmark.tables import (
    DECODE,
    ERRORS,
    LONGEST,
    PREFILL,
    REQUESTS,
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
    "command, or where it is quoted from": lambda run: run.get("quoted") or f"`{run.get('command')}`",
}

SECTIONS = (
    ("Decode", "decode_ms_a_step", DECODE),
    ("Prefill", "prefill_tokens_per_second", PREFILL),
    ("Requests", "output_tokens_per_second", REQUESTS),
)
"""Title, the measure that a row must have to be shown, and the columns."""


def page(documents: Sequence[dict[str, Any]], folder: Path | None) -> str:
    """The report of all documents; with a folder, its plots are drawn there and shown."""
    rows = rows_of(documents)
    parts = ["# Benchmark", "", table(SOURCES, documents)]
    for model in dict.fromkeys(row["model"] for row in rows):
        parts += [f"## {model}", "", *_of_model([row for row in rows if row["model"] == model])]
    return "\n".join(parts).rstrip() + "\n"


def _of_model(rows: list[Row]) -> list[str]:
    parts = []
    for title, measure, columns in SECTIONS:
        shown = [row for row in rows if row.get(measure) is not None]
        if shown:
            parts += [f"### {title}", "", table(columns, sorted(shown, key=_order))]
    failed = [row for row in rows if "error" in row]
    if failed:
        parts += ["### Cases that did not run", "", table(ERRORS, failed)]
    for row in rows:
        for step in ("prefill", "decode"):
            longest = get(f"{step}_breakdown", "longest")(row)
            if longest:
                title = f"#### Longest in {step}: {case_name(row)}, {label(row)}, degree {row['degree']}"
                parts += [title, "", table(LONGEST, longest)]
    return parts


def _order(row: Row) -> tuple[Any, ...]:
    return row["batch"], row["prompt_tokens"], row["new_tokens"], row["degree"], label(row)
