"""The kernel benchmark's report as Markdown."""

from __future__ import annotations

from typing import Any

COLUMNS = {
    "op": ("op", ""), "degree": ("degree", "d"), "sequences": ("sequences", "d"), "tokens": ("tokens", "d"),
    "width": ("width", "d"), "us": ("us", ".1f"), "floor_us": ("floor us", ".1f"),
    "of_floor": ("of floor", ".0%"), "gb_s": ("GB/s", ".0f"), "of_nominal": ("of nominal", ".0%"),
    "reference_us": ("definition us", ".0f"), "peer_us": ("peer us", ".1f"), "speedup": ("×", ".2f"),
    "peer": ("peer", ""),
}  # fmt: skip
"""Key of a row -> its heading, and the format of its values."""


def markdown(report: dict[str, Any]) -> str:
    """A page: where and how it was measured, and a table for each model."""
    rows = report["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    parts = [
        f"# Kernels at the shapes of {', '.join(models)}",
        ", ".join(f"{name} {version}" for name, version in report["environment"].items()),
        f"`{report['command']}`",
        _about(report),
    ]
    for model in models:
        parts += [f"## {model}", _table([row for row in rows if row["model"] == model])]
    return "\n\n".join(parts) + "\n"


def _about(report: dict[str, Any]) -> str:
    ceilings, nominal = report["ceilings"], report.get("nominal_bytes")
    if not ceilings:
        return "The definitions alone, to try the program."
    own = "" if nominal is None else f"; on paper the memory has {nominal / 1e12:.2f}"
    copy = f"{ceilings['bytes'] / 1e12:.2f} TB/s"
    return (
        f"The floor counts bytes at the rate of a large copy, {copy} in this run; kernels can "
        f"exceed it{own}. Peers run in the same process, on the layouts that they want; × is how many times "
        "faster ours is."
    )


def _table(rows: list[dict[str, Any]]) -> str:
    heads = [head for head, _ in COLUMNS.values()]
    aligned = ["---" if form == "" else "---:" for _, form in COLUMNS.values()]
    lines = [heads, aligned]
    lines += [
        [format(row[key], form) if key in row else "-" for key, (_, form) in COLUMNS.items()] for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
