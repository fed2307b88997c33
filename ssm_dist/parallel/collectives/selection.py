"""How a reduction travels: what is asked for, and the algorithm that serves a call.

The choice depends on static sizes and on a table that all ranks hold alike, so that they agree without
talking; it is never measured while serving.

    all_reduce    NCCL's or gloo's own, numbers as they are
    exchange      two shots over the process group, with the codec
    one_shot      over shared memory, for short messages: everybody sends to everybody, numbers as they are
    two_shot      the same by way of owners of rows, for longer ones
    bulk          over shared memory, for long messages, in two shots with the codec
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ssm_dist.kernels.codecs import DTYPES, CodecName
from ssm_dist.parallel.collectives.groups import TIMEOUT_SECONDS, Group
from ssm_dist.parallel.collectives.tables import ON_THE_PROCESS_GROUP, SERVING, by_table

Algorithm = Literal["auto", "process_group", "all_reduce", "exchange", "one_shot", "two_shot", "bulk"]
"""auto goes by the table; process_group too, as if the GPUs shared no memory; the rest are as above."""


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
    feedback: bool = False
    """Whether what a branch's codec drops goes into the next branch; see `parallel.feedback`."""

    def __post_init__(self) -> None:
        if self.feedback and self.branch.codec == "none":
            raise ValueError("a branch without a codec leaves nothing to feed back")
        if self.feedback and self.branch.algorithm not in ("auto", "process_group", "exchange"):
            raise ValueError(f"error feedback goes over the process group, not by {self.branch.algorithm}")


EXACT = Reductions()


def choose(
    group: Group, x: Tensor, codec: str, group_size: int, algorithm: str, with_norm: bool = False
) -> str:
    """The algorithm that serves a sum of x (rows, width), or one with residual and norm.

    What was asked for, or what the table has, where it fits; else the next that does.
    """
    memory = None if algorithm == "process_group" else group.memory
    if x.dtype not in DTYPES and codec == "none":
        return "all_reduce"
    wanted = algorithm
    if algorithm not in SERVING:
        wanted = by_table("shared" if memory else group.backend, group.size, codec, x.numel() * x.itemsize)
    for candidate in (wanted, "bulk"):
        if candidate in ON_THE_PROCESS_GROUP:
            return candidate
        if memory is not None and memory.fits(candidate, x, codec, group_size, with_norm):
            return candidate
    return by_table(group.backend, group.size, codec, x.numel() * x.itemsize)


def is_one_shot(group: Group, rows: Tensor, wire: Wire, with_norm: bool) -> bool:
    """Whether the group would sum rows (T, N) like these one-shot.

    Then a kernel may send them itself, as they are, and add up what comes. By sizes, alike on all ranks.
    """
    return choose(group, rows, wire.codec, wire.group_size, wire.algorithm, with_norm) == "one_shot"
