"""What `reductions.py` measured, as tables: for people, and for `[reduction] table`."""

from __future__ import annotations

from typing import Any

from reductions_ways import WAYS

from ssm_dist.calibration import Timing, table_of
from ssm_dist.parallel.collectives.tables import CODECS, TRANSPORTS, Table

Row = dict[str, Any]

SIZES = {"int8": "128", "fp8": "128", "int4": "32"}
"""The group sizes that a table is made for, by codec."""
ALLOWED = 1.03
"""How much slower than NCCL `auto` may be."""


def names_in(rows: list[Row]) -> list[str]:
    """The ways that were measured; those of WAYS first, and in its order."""
    found = dict.fromkeys(name for row in rows for name in row if isinstance(row[name], dict))
    return [name for name in WAYS if name in found] + [name for name in found if name not in WAYS]


def one_line(row: Row) -> str:
    """A case, for the terminal."""
    base = row.get("nccl", {}).get("us")
    parts = []
    for name in names_in([row]):
        found = row[name]
        if "us" not in found:
            parts.append(f"{name} FAILED {found['error'][:90]}")
            continue
        ratio = f" x{base / found['us']:.2f}" if base and name != "nccl" else ""
        bits = "" if found["same"] else " DIFFERENT BITS"
        parts.append(f"{name} {found['us']:.1f}{ratio} ({found['error']:.4f}){bits}")
    return f"{row['section']:6} {row['rows']:6} x {row['width']:4}: " + " | ".join(parts)


def markdown(document: Row) -> str:
    """The report: a table a section, microseconds and in brackets the speed-up over NCCL."""
    about = {key: value for key, value in document.items() if key not in ("rows", "broken")}
    lines = ["# Latency of the reductions", "", ", ".join(f"{k} {v}" for k, v in about.items()), ""]
    lines += ["Microseconds; in brackets, how many times faster than `nccl`. The bits of all ranks agree in "]
    lines[-1] += f"{_agreeing(document['rows'])}. {_slow(document['rows'])}"
    if document["broken"]:
        lines += ["", f"Shared memory failed at {document['broken']} and was not used from there on."]
    for section in dict.fromkeys(row["section"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["section"] == section]
        names = names_in(rows)
        lines += ["", f"## {section}", "", f"| rows x width | KB | {' | '.join(names)} |"]
        lines += ["|" + "---|" * (len(names) + 2)]
        for row in rows:
            cells = [_cell(row, name) for name in names]
            lines += [f"| {row['rows']} x {row['width']} | {row['bytes'] / 1e3:.0f} | {' | '.join(cells)} |"]
    errors = _errors(document["rows"])
    lines += ["", "Relative L2 error, largest: " + ", ".join(f"{name} {e:.4f}" for name, e in errors.items())]
    return "\n".join(lines) + "\n"


def table_of_rows(rows: list[Row], ranks: int, backend: str) -> Table | None:
    """The fastest algorithm by size from the section plain, in the place of what ships; None without one."""
    timings = []
    for row in [row for row in rows if row["section"] == "plain"]:
        shared = any("us" in row.get(name, {}) for name in ("one_shot", "bulk"))
        for transport in ("shared", backend) if shared else (backend,):
            for codec in CODECS:
                for algorithm in TRANSPORTS[transport]:
                    coded = f"{algorithm} {codec}/{SIZES[codec]}" if codec in SIZES else algorithm
                    found = row.get(coded if coded in WAYS else algorithm, {})
                    if "us" in found:
                        timings.append(Timing(transport, codec, algorithm, row["bytes"], found["us"] / 1e6))
    return table_of(timings, ranks) if timings else None


def _cell(row: Row, name: str) -> str:
    found, base = row.get(name), row.get("nccl", {}).get("us")
    if found is None:
        return "-"
    if "us" not in found:
        return "failed"
    return f"{found['us']:.1f}" + (f" ({base / found['us']:.2f})" if base and name != "nccl" else "")


def _all(rows: list[Row]) -> list[tuple[Row, str, dict[str, Any]]]:
    return [(row, name, row[name]) for row in rows for name in names_in([row]) if "us" in row[name]]


def _agreeing(rows: list[Row]) -> str:
    found = [way["same"] for _, _, way in _all(rows)]
    return f"{sum(found)} of {len(found)} cases"


def _slow(rows: list[Row]) -> str:
    """Where `auto` is slower than NCCL."""
    slow = [
        f"{row['section']} {row['rows']} x {row['width']} ({way['us'] / row['nccl']['us']:.2f})"
        for row, name, way in _all(rows)
        if name == "auto" and "us" in row.get("nccl", {}) and way["us"] > ALLOWED * row["nccl"]["us"]
    ]
    return f"`auto` takes more than {ALLOWED} times as long as NCCL at: {', '.join(slow) or 'no size'}."


def _errors(rows: list[Row]) -> dict[str, float]:
    errors: dict[str, float] = {}
    for _, name, way in _all(rows):
        errors[name] = max(errors.get(name, 0.0), way["error"])
    return errors
