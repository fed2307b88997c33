"""Which algorithm is the fastest for a message, as data.

A table ships; `ssm-dist calibrate` measures one on a host and writes it as JSON, for `[reduction] table`.
"""

from __future__ import annotations

import json
from typing import Any

from ssm_dist.errors import UserError

ON_THE_PROCESS_GROUP = ("all_reduce", "exchange")
SERVING = (*ON_THE_PROCESS_GROUP, "one_shot", "two_shot", "bulk")
"""Algorithms; `selection` says what they are."""

TRANSPORTS = {"shared": SERVING, "nccl": ON_THE_PROCESS_GROUP, "gloo": ON_THE_PROCESS_GROUP}
"""What carries a message, and the algorithms that can."""

CODECS = ("none", "int8", "fp8", "int4")

Rows = list[tuple[float, str]]
"""(largest message in bytes of the dtype that it has, algorithm), rising; the last limit is ANY."""

ANY = float("inf")

Table = dict[str, dict[int, dict[str, Rows]]]
"""Transport -> ranks -> codec -> rows. Numbers of ranks that are missing take the row below theirs."""


def _rows(exact: Rows, quantised: Rows | None = None) -> dict[str, Rows]:
    return {codec: exact if codec == "none" else quantised or exact for codec in CODECS}


SHIPPED: Table = {
    "shared": {
        2: _rows([(5.5e6, "one_shot"), (ANY, "bulk")]),
        4: _rows([(256e3, "one_shot"), (5e6, "two_shot"), (ANY, "bulk")]),
        8: _rows([(64e3, "one_shot"), (4e6, "two_shot"), (ANY, "bulk")]),
    },
    "nccl": {2: _rows([(ANY, "all_reduce")], [(2e6, "all_reduce"), (ANY, "exchange")])},
    "gloo": {2: _rows([(ANY, "all_reduce")], [(ANY, "exchange")])},
}
"""Two ranks: measured on H100s and H200s (benchmarks/reductions), where 5 MB with residual and norm are the
fastest by one_shot, a codec or not; less is quantised for nothing. Four and more: from a study on H200s,
exact; with a codec reasoned from two. Over gloo, a codec is for trying it out: it always applies."""

_used: Table = SHIPPED


def by_table(transport: str, ranks: int, codec: str, message_bytes: int) -> str:
    """The algorithm of the table in use."""
    known = max([n for n in _used[transport] if n <= ranks] or [min(_used[transport])])
    return next(name for limit, name in _used[transport][known][codec] if message_bytes <= limit)


def use_table(table: Table) -> None:
    """Let `auto` go by another table from now on; all ranks must be given the same one."""
    global _used
    _used = table


def table_to_json(table: Table) -> str:
    """One line a codec, so that people can read and edit it."""
    lines = []
    for transport, by_ranks in table.items():
        for ranks, by_codec in by_ranks.items():
            for codec, rows in by_codec.items():
                written = [[None if limit == ANY else int(limit), name] for limit, name in rows]
                record = {"transport": transport, "ranks": ranks, "codec": codec, "rows": written}
                lines.append(json.dumps(record))
    return "[\n" + ",\n".join(lines) + "\n]\n"


def table_from_json(text: str, source: str) -> Table:
    """The table that `table_to_json` wrote. Raises `UserError`, naming the source, for anything else."""
    table: Table = {}
    try:
        for record in json.loads(text):
            rows = [(ANY if limit is None else float(limit), str(name)) for limit, name in record["rows"]]
            _check(record, rows)
            table.setdefault(record["transport"], {}).setdefault(record["ranks"], {})[record["codec"]] = rows
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{source} is no table of reductions: {type(error).__name__}: {error}") from None
    missing = [f"{t}, codec {c}" for t in TRANSPORTS for c in CODECS if not _complete(table, t, c)]
    if missing:
        raise UserError(f"{source} is no table of reductions: nothing for {'; '.join(missing)}")
    return table


def _check(record: dict[str, Any], rows: Rows) -> None:
    able = TRANSPORTS[record["transport"]]
    unknown = [name for _, name in rows if name not in able]
    if unknown:
        raise ValueError(f"{record['transport']} has no algorithm {unknown[0]!r}, only {', '.join(able)}")
    limits = [limit for limit, _ in rows]
    if not limits or limits[-1] != ANY or limits != sorted(limits):
        raise ValueError(f"limits must rise and end with null, not {limits}")


def _complete(table: Table, transport: str, codec: str) -> bool:
    by_ranks = table.get(transport, {})
    return bool(by_ranks) and all(codec in by_codec for by_codec in by_ranks.values())
