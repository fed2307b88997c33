"""What we want to reach, on H200 GPUs of one host, and whether the rows of a report do.

A target counts as met when the measure of its case is as good; where several cases are its own, the worst
one counts, each with its best codec unless the target names one. Beside it stands the best peer's measure of
the same case on as many GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ssm_dist.benchmark.tables import MATCH, Row, case_name, label

HARDWARE = "H200"

SHORT_PROMPT = 128
"""Tokens of a prompt up to which a decode step counts as one after a short prompt."""
IN_FLIGHT = 16384
"""Prompt tokens of a case from which on the targets of prefill hold for it."""


WAY = ("kernels", "compile", "state_dtype")
"""Keys of how an engine of ours ran, whatever the degree."""


@dataclass(frozen=True)
class Measure:
    """One figure that systems are compared by."""

    name: str
    """Of the key in a row."""
    unit: str
    less_is_better: bool
    matched_by: tuple[str, ...]
    """What two rows have in common to be compared."""

    def better(self, value: float, than: float) -> float:
        """How many times better."""
        return than / value if self.less_is_better else value / than


DECODE = Measure("decode_ms_a_step", "ms a decode step", True, ("model", "batch", "prompt_tokens"))
PREFILL = Measure("prefill_tokens_per_second", "prompt tokens/s", False, ("model", "batch", "prompt_tokens"))
REQUESTS = Measure("output_tokens_per_second", "output tokens/s", False, MATCH)
MEASURES = (DECODE, PREFILL, REQUESTS)


@dataclass(frozen=True)
class Target:
    """One row: by degree, what is to be reached."""

    model: str
    measure: Measure
    by_degree: dict[int, float]
    batch: int | None = None
    """Of a decode step; None for prefill."""
    case: str | None = None
    """Of requests."""
    codec: str | None = None
    """On several ranks; None for the best."""

    def holds_for(self, row: Row) -> bool:
        """Whether a row, of whatever system, is one of its cases."""
        if row["model"] != self.model or row.get(self.measure.name) is None:
            return False
        if self.measure is DECODE:
            return bool(row["batch"] == self.batch and row["prompt_tokens"] <= SHORT_PROMPT)
        if self.measure is PREFILL:
            return bool(row["batch"] * row["prompt_tokens"] >= IN_FLIGHT)
        return case_name(row) == self.case

    def __str__(self) -> str:
        what = {
            DECODE.name: f"decode, {self.batch} sequence{'s' * (self.batch != 1)}",
            PREFILL.name: f"prefill, {IN_FLIGHT:,} tokens or more",
            REQUESTS.name: f"requests {self.case}",
        }[self.measure.name]
        return what + (f", {self.codec}" if self.codec not in (None, "none") else "")


TARGETS = (
    Target("mamba-2.8b", DECODE, {1: 1.6, 2: 1.1, 4: 0.9}, batch=1),
    Target("mamba-2.8b", DECODE, {1: 2.6, 2: 1.7, 4: 1.3}, batch=64),
    Target("mamba-2.8b", DECODE, {1: 5.0, 2: 3.0, 4: 2.0}, batch=256),
    Target("mamba-2.8b", PREFILL, {1: 98e3, 2: 165e3, 4: 240e3}, codec="none"),
    Target("mamba-2.8b", PREFILL, {2: 180e3, 4: 300e3}, codec="int8"),
    Target("mamba-2.8b", REQUESTS, {1: 4900.0, 2: 8700.0, 4: 14000.0}, case="64x2048+128", codec="int8"),
    Target("falcon-mamba-7b", DECODE, {1: 4.0, 2: 2.4, 4: 1.6}, batch=1),
    Target("falcon-mamba-7b", PREFILL, {1: 38e3, 2: 70e3, 4: 120e3}, codec="int8"),
    Target("zamba-7b", DECODE, {1: 6.5, 2: 3.7, 4: 2.4}, batch=1),
    Target("zamba-7b", PREFILL, {1: 24e3, 2: 45e3, 4: 80e3}),
)

SCALING = {2: 1.7, 4: 2.7}
"""By degree, times the output tokens/s of one GPU."""
SCALED = ("64x2048+128", "8x16384+128")


def compared(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every target, at every degree that we measured its model at, beside what was measured."""
    measured = {(row["model"], row["degree"]) for row in rows if row["system"] == "ssm-dist"}
    return [
        _compared(target, degree, rows)
        for target in TARGETS
        for degree in target.by_degree
        if (target.model, degree) in measured
    ]


def _compared(target: Target, degree: int, rows: Sequence[Row]) -> dict[str, Any]:
    wanted, measure = target.by_degree[degree], target.measure
    told: dict[str, Any] = {
        "model": target.model, "target": str(target), "degree": degree, "wanted": wanted,
        "unit": measure.unit,
    }  # fmt: skip
    codec = target.codec if degree > 1 else "none"
    ours = [
        row for row in rows
        if row["system"] == "ssm-dist" and row["degree"] == degree and row["p2p"] and target.holds_for(row)
        and not row.get("replicas")
        and codec in (None, row["codec"])
    ]  # fmt: skip
    if not ours:
        return told | {"met": "not measured"}
    row = min(_best_of_each_case(ours, measure), key=lambda row: measure.better(row[measure.name], wanted))
    value, peer = row[measure.name], best_peer(row, measure, rows)
    told |= {"case": case_name(row), "codec": row["codec"], "measured": value}
    told |= {"times": round(measure.better(value, wanted), 3)}
    told["met"] = "met" if measure.better(value, wanted) >= 1 else "not met"
    if peer is not None:
        told |= {"peer": label(peer), "peer_value": peer[measure.name]}
        told["peer_times"] = round(measure.better(value, peer[measure.name]), 2)
    return told


def _best_of_each_case(rows: Sequence[Row], measure: Measure) -> list[Row]:
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        case = tuple(row[key] for key in MATCH)
        if case not in best or measure.better(row[measure.name], best[case][measure.name]) > 1:
            best[case] = row
    return list(best.values())


def best_peer(row: Row, measure: Measure, rows: Sequence[Row]) -> Row | None:
    """The peer that is best at a row's case on as many GPUs; None where none has measured it."""
    peers = [
        other for other in rows
        if other["system"] != row["system"] and other["degree"] == row["degree"]
        and other.get(measure.name) is not None and all(other[key] == row[key] for key in measure.matched_by)
    ]  # fmt: skip
    return min(peers, key=lambda peer: measure.better(row[measure.name], peer[measure.name]), default=None)


def on_one_gpu(row: Row, rows: Sequence[Row]) -> Row | None:
    """The same system's row of the same case on one GPU, run in the same way."""
    alike = [
        other for other in rows
        if other["system"] == row["system"] and other["degree"] == 1
        and all(other.get(key) == row.get(key) for key in (*MATCH, *WAY))
    ]  # fmt: skip
    return alike[0] if alike else None


def scaled(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How many times one GPU's output tokens/s several reach, where both were measured."""
    found = []
    for row in rows:
        single = on_one_gpu(row, rows)
        if (
            row["system"] != "ssm-dist" or row["degree"] not in SCALING or case_name(row) not in SCALED
            or REQUESTS.name not in row or single is None or REQUESTS.name not in single
        ):  # fmt: skip
            continue
        times, wanted = row[REQUESTS.name] / single[REQUESTS.name], SCALING[row["degree"]]
        found.append(
            {
                "model": row["model"], "case": case_name(row), "system": label(row), "degree": row["degree"],
                "one": single[REQUESTS.name], "measured": row[REQUESTS.name], "times": round(times, 3),
                "wanted": wanted, "met": "met" if times >= wanted else "not met",
            }
        )  # fmt: skip
    return found
