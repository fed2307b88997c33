"""How a reduction travels: what is asked for, and the algorithm that serves a call.

The choice depends on static sizes and on a table that all ranks hold alike, so that they agree without
talking; it is never measured while serving.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ssm_dist.kernels.codecs import CodecName
from ssm_dist.parallel.collectives.groups import TIMEOUT_SECONDS, Group

Algorithm = Literal["auto", "all_reduce", "exchange"]


@dataclass(frozen=True)
class Wire:
    """How one kind of reduction travels."""

    codec: CodecName = "none"
    group_size: int = 128
    algorithm: Algorithm = "auto"


@dataclass(frozen=True)
class Reductions:
    """How the reductions of a model travel, by kind."""

    branch: Wire = Wire()
    """What out_proj, o_proj and down_proj leave for the seams."""
    x_proj: Wire = Wire()
    """Small, and it feeds the recurrence: dt, B and C."""
    embedding: Wire = Wire()
    """Exact without any rounding, since one rank has the row."""
    timeout_seconds: float = TIMEOUT_SECONDS


EXACT = Reductions()


def choose(group: Group, codec: str, algorithm: str) -> str:
    """The algorithm that serves a call."""
    if algorithm != "auto":
        return algorithm
    return "all_reduce" if codec == "none" else "exchange"
