"""Documents of runs, ours and the peers', as rows, and rows as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]

CASE = ("batch", "prompt_tokens", "new_tokens")
MATCH = ("model", *CASE)
"""What cases of unlike systems and degrees are compared by."""


def rows_of(documents: Iterable[dict[str, Any]]) -> list[Row]:
    """Every case of every document, and the system that ran it. Of several that measured alike, the last."""
    rows: dict[tuple[Any, ...], Row] = {}
    for document in documents:
        told = {key: document.get(key) for key in ("system", "version", "quoted")}
        for case in document["cases"]:
            row = {"degree": 1, "codec": "none", "p2p": True, **told, **case}
            rows[(label(row), row["degree"], *(row[key] for key in MATCH))] = row
    return list(rows.values())


def label(row: Row) -> str:
    """The system, and what it was told to do otherwise than by default."""
    ours = row["system"] == "ssm-dist"
    parts = [row["system"] if ours else f"{row['system']} {row['version'] or ''}".strip()]
    parts += [row["codec"]] if row["codec"] != "none" else []
    parts += [] if row["p2p"] else ["no P2P"]
    parts += ["replicas"] if row.get("replicas") else []
    if ours and row.get("kernels", "reference") != "reference":
        parts += [row["kernels"]] if row["kernels"] != "triton" else []
        parts += {"none": ["uncaptured"], "compile": ["compiled"]}.get(row.get("compile", ""), [])
    if ours and row.get("state_dtype", "float32") != "float32":
        parts.append(f"{row['state_dtype']} states")
    return ", ".join(parts) + (" (quoted)" if row["quoted"] else "")


def case_name(row: Row) -> str:
    """BxP+G."""
    return f"{row['batch']}x{row['prompt_tokens']}+{row['new_tokens']}"


def table(columns: dict[str, Callable[[Row], Any]], rows: Iterable[Row]) -> str:
    """A Markdown table; a column whose cells are all None is left out, other Nones are dashes."""
    cells = [{name: value(row) for name, value in columns.items()} for row in rows]
    names = [name for name in columns if any(row[name] is not None for row in cells)]
    if not cells or not names:
        return ""
    numeric = [all(isinstance(row[name], (int, float, type(None))) for row in cells) for name in names]
    lines = [_line(names), "|" + "".join("---:|" if right else "---|" for right in numeric)]
    return "\n".join(lines + [_line([number(row[name]) for name in names]) for row in cells]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def number(value: Any) -> str:
    """Four figures of a number, thousands apart; a dash for None."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def get(*path: str) -> Callable[[Row], Any]:
    """What lies at a path of keys, or None."""

    def value(row: Row) -> Any:
        found: Any = row
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    return value


def ratio(above: Callable[[Row], Any], below: Callable[[Row], Any]) -> Callable[[Row], Any]:
    """The quotient of two values, or None."""

    def value(row: Row) -> Any:
        over, under = above(row), below(row)
        return round(over / under, 3) if over is not None and under else None

    return value


def spread_percent(*path: str) -> Callable[[Row], Any]:
    """How far the slowest and the fastest repeat are apart, in percent of the median."""

    def value(row: Row) -> Any:
        found = get(*path)(row)
        return found and round(100 * (found["max"] - found["min"]) / found["median"], 1)

    return value


def _times(measure: str) -> dict[str, Callable[[Row], Any]]:
    """How many times better than our own on one GPU, and than the best peer on as many."""
    return {"× 1 GPU": get("times", measure, "one"), "× best peer": get("times", measure, "peer")}


def _clock(step: str) -> dict[str, Callable[[Row], Any]]:
    """Of a GPU meanwhile; the share of readings in which its power allowed no more is in percent."""
    capped = get(step, "capped")
    return {
        "MHz": get(step, "mhz"),
        "W": get(step, "watts"),
        "power-capped %": lambda row: None if capped(row) is None else round(100 * capped(row)),
    }


def _gap(breakdown: str, time: Callable[[Row], Any], milliseconds: float) -> Callable[[Row], Any]:
    """What a step takes beyond its kernels, in milliseconds; `milliseconds` are in a unit of `time`."""

    def value(row: Row) -> Any:
        busy, whole = get(breakdown, "busy_ms")(row), time(row)
        return None if busy is None or whole is None else round(milliseconds * whole - busy, 3)

    return value


_WHO: dict[str, Callable[[Row], Any]] = {"case": case_name, "system": label, "degree": get("degree")}

DECODE: dict[str, Callable[[Row], Any]] = _WHO | {
    "ms a step": get("decode_ms_a_step"),
    "± %": spread_percent("decode_step_seconds"),
    "tokens/s": get("decode_tokens_per_second"),
    "GB/s": get("decode_gb_per_second"),
    "floor ms": get("decode_floor_ms"),
    "of floor": ratio(get("decode_floor_ms"), get("decode_ms_a_step")),
    **_times("decode_ms_a_step"),
    "kernels": get("decode_breakdown", "kernels"),
    "launches": get("decode_breakdown", "launches"),
    "kernels ms": get("decode_breakdown", "busy_ms"),
    "gap ms": _gap("decode_breakdown", get("decode_ms_a_step"), 1.0),
    "reductions ms": get("decode_breakdown", "reduction_ms"),
    **_clock("decode_clock"),
    "compile": get("compile"),
}

PREFILL: dict[str, Callable[[Row], Any]] = _WHO | {
    "tokens/s": get("prefill_tokens_per_second"),
    "s": get("prefill_seconds", "median"),
    "± %": spread_percent("prefill_seconds"),
    "TFLOP/s a GPU": get("prefill_tflop_per_second_a_rank"),
    "of floor": ratio(get("prefill_floor_seconds"), get("prefill_seconds", "median")),
    **_times("prefill_tokens_per_second"),
    "kernels": get("prefill_breakdown", "kernels"),
    "kernels ms": get("prefill_breakdown", "busy_ms"),
    "gap ms": _gap("prefill_breakdown", get("prefill_seconds", "median"), 1e3),
    "reductions ms": get("prefill_breakdown", "reduction_ms"),
    **_clock("prefill_clock"),
}

REQUESTS: dict[str, Callable[[Row], Any]] = _WHO | {
    "output tokens/s": get("output_tokens_per_second"),
    "± %": spread_percent("request_seconds"),
    **_times("output_tokens_per_second"),
    "first token ms": get("first_token_ms", "median"),
    "p99": get("first_token_ms", "p99"),
    "a token ms": get("token_ms", "median"),
    " p99": get("token_ms", "p99"),
    "peak GB a GPU": lambda row: row.get("peak_memory_bytes") and row["peak_memory_bytes"] / 1e9,
}

ERRORS: dict[str, Callable[[Row], Any]] = _WHO | {"why it did not run": get("error")}

LONGEST: dict[str, Callable[[Row], Any]] = {
    "kernel": get("name"), "count": get("count"), "ms": get("ms"),
}  # fmt: skip

TARGETS: dict[str, Callable[[Row], Any]] = {
    "target": get("target"),
    "degree": get("degree"),
    "wanted": get("wanted"),
    "measured": get("measured"),
    "unit": get("unit"),
    "times": get("times"),
    "": get("met"),
    "case": get("case"),
    "codec": get("codec"),
    "best peer": get("peer"),
    "peer's": get("peer_value"),
    "× peer": get("peer_times"),
}

SCALING: dict[str, Callable[[Row], Any]] = {
    "requests": get("case"),
    "system": get("system"),
    "degree": get("degree"),
    "output tokens/s": get("measured"),
    "on 1 GPU": get("one"),
    "times": get("times"),
    "wanted": get("wanted"),
    "": get("met"),
}
