"""The reductions as operators that torch.compile does not look into."""

import logging

import torch
from torch import Tensor

from ssm_dist.kernels import add_rms_norm
from ssm_dist.kernels.operators import operator
from ssm_dist.parallel.collectives.exchange import (
    Errors,
    all_reduce,
    exchange,
    exchange_add_rms_norm,
    exchange_with_feedback,
)
from ssm_dist.parallel.collectives.failures import Call
from ssm_dist.parallel.collectives.groups import Group, group_named, is_registered
from ssm_dist.parallel.collectives.selection import choose
from ssm_dist.parallel.collectives.tables import ON_THE_PROCESS_GROUP, SERVING

logger = logging.getLogger(__name__)
_announced: set[tuple[str, str]] = set()
"""What was asked for, and what serves in its place."""


def _like_sum(
    x: Tensor, group: str, codec: str = "none", group_size: int = 128, algorithm: str = "auto"
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator("tp_all_reduce", fake=_like_sum)
def tp_all_reduce(
    x: Tensor, group: str, codec: str = "none", group_size: int = 128, algorithm: str = "auto"
) -> Tensor:
    """The sum of every rank's x (..., width) over `group`, the same bits on all; a fresh tensor of x's dtype.

    codec, group_size: see `ssm_dist.kernels.codecs`; x must then be float32, bfloat16 or float16. algorithm:
    see `selection`. Raises `RankFailure` when a rank does not take part in time.
    """
    ranks = group_named(group)
    if ranks.size == 1 or x.numel() == 0:
        return x.clone(memory_format=torch.contiguous_format)
    ranks.next_call()
    rows = x.reshape(-1, x.shape[-1] if x.dim() else 1)
    return _reduced(rows, ranks, codec, group_size, algorithm, "all-reduce").view(x.shape)


def like_normed(
    partial: Tensor, residual: Tensor | None, weight: Tensor, eps: float, group: str,
    codec: str = "none", group_size: int = 128, algorithm: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(partial.dtype, torch.float32)
    return partial.new_empty(partial.shape, dtype=weight.dtype), partial.new_empty(partial.shape, dtype=wide)


@operator("tp_all_reduce_add_rms_norm", fake=like_normed)
def tp_all_reduce_add_rms_norm(
    partial: Tensor, residual: Tensor | None, weight: Tensor, eps: float, group: str,
    codec: str = "none", group_size: int = 128, algorithm: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`kernels.add_rms_norm` of the sum of every rank's partial (T, H), the same bits on all ranks.

    The rest as in `tp_all_reduce`.
    """
    ranks, name = group_named(group), "all-reduce with norm"
    if ranks.size == 1 or partial.numel() == 0:
        return add_rms_norm(partial.clone(), residual, weight, eps)
    ranks.next_call()
    if ranks.memory is not None and partial.dtype == weight.dtype:
        chosen = _chosen(ranks, partial, codec, group_size, algorithm, with_norm=True)
        if chosen not in ON_THE_PROCESS_GROUP:
            return ranks.memory.all_reduce_add_rms_norm(
                partial, residual, weight, eps, chosen, codec, group_size, ranks.leaves_room
            )
    return add_rms_norm(_reduced(partial, ranks, codec, group_size, algorithm, name), residual, weight, eps)


def _like_normed_split(
    partial: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str, degree: int,
    codec: str = "none", group_size: int = 128, algorithm: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, width = partial.shape
    stripe = partial.new_empty(((rows + degree - 1) // degree, width), dtype=torch.float32)
    return partial.new_empty(partial.shape, dtype=weight.dtype), stripe


@operator("tp_all_reduce_add_rms_norm_split", fake=_like_normed_split)
def tp_all_reduce_add_rms_norm_split(
    partial: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str, degree: int,
    codec: str = "none", group_size: int = 128, algorithm: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `tp_all_reduce_add_rms_norm`, but each of the `degree` ranks keeps a stripe of the residual stream.

    residual: whole (T, H), or this rank's stripe (ceil(T / degree), H). Returns the normed rows, whole and
    the same bits on all ranks, and this rank's stripe of the new stream; its rows past T are undefined.
    """
    ranks = group_named(group)
    assert ranks.size == degree
    ranks.next_call()
    if _chosen(ranks, partial, codec, group_size, algorithm, with_norm=True) == "bulk":
        assert ranks.memory is not None
        return ranks.memory.split_add_rms_norm(
            partial, residual, weight, eps, codec, group_size, ranks.leaves_room
        )
    call = Call.of(ranks, "all-reduce with norm", partial)
    return exchange_add_rms_norm(partial, residual, weight, eps, call, codec, group_size)


def tp_all_reduce_with_feedback(
    x: Tensor, errors: Errors | None, group: str, codec: str, group_size: int
) -> tuple[Tensor, Errors]:
    """The sum of every rank's x (T, H), by `exchange` with error feedback, the same bits on all ranks.

    errors: what the call before returned after its sum, None the first time; so the sums of calls in a row
    add up to the exact ones but for the last call's errors. The codec must not be none.
    """
    ranks = group_named(group)
    ranks.next_call()
    call = Call.of(ranks, "all-reduce with feedback", x)
    return exchange_with_feedback(x, errors, call, codec, group_size)


def goes_encoded(
    x: Tensor, group: str, codec: str, group_size: int, algorithm: str, with_norm: bool
) -> bool:
    """Whether a sum of x (T, H), or one with residual and norm, is long enough for its codec."""
    if codec == "none" or not is_registered(group) or group_named(group).size == 1 or x.numel() == 0:
        return False
    return choose(group_named(group), x, codec, group_size, algorithm, with_norm) in ("exchange", "bulk")


def splits_residual(partial: Tensor, group: str, codec: str, group_size: int, algorithm: str) -> bool:
    """Whether it pays to keep the residual stream split, by rows: where long messages go over shared memory.

    There the norm costs as much as the sum, and is shared out this way. With a codec it has a price: what is
    sent last, and rounded, is the normed stream instead of the branch, which is small beside the stream (see
    benchmarks/reduction_fidelity).
    """
    if not is_registered(group):
        return False
    ranks = group_named(group)
    if ranks.memory is None or len(partial) < ranks.size:
        return False
    chosen = choose(ranks, partial, codec, group_size, algorithm, with_norm=True)
    return chosen == "bulk" and ranks.memory.fits_in_one_block(partial, codec, group_size)


def tp_all_reduce_spent(
    x: Tensor, group: str, codec: str = "none", group_size: int = 128, algorithm: str = "auto"
) -> Tensor:
    """As `tp_all_reduce`, for an x that nobody needs afterwards: its memory may hold the sum."""
    how = (codec, group_size, algorithm)
    if not sums_in_place(x, group, *how):
        total: Tensor = tp_all_reduce(x, group, *how)
        return total
    ranks = group_named(group)
    ranks.next_call()
    return all_reduce(x, Call.of(ranks, "all-reduce", x), in_place=True)


def sums_in_place(x: Tensor, group: str, codec: str, group_size: int, algorithm: str) -> bool:
    """Whether x (..., width) can become its sum, without a copy: by the process group's own, in eager code.

    An operator, as compiled code has it, returns new tensors.
    """
    if torch.compiler.is_compiling() or not is_registered(group):
        return False
    ranks = group_named(group)
    if ranks.size == 1 or x.numel() == 0 or x.requires_grad or not x.is_contiguous():
        return False
    return choose(ranks, x.view(-1, x.shape[-1]), codec, group_size, algorithm) == "all_reduce"


def _reduced(x: Tensor, group: Group, codec: str, group_size: int, algorithm: str, name: str) -> Tensor:
    """The sum of every rank's x (rows, width)."""
    chosen = _chosen(group, x, codec, group_size, algorithm)
    if chosen == "all_reduce":
        return all_reduce(x, Call.of(group, name, x))
    if chosen == "exchange":
        return exchange(x, Call.of(group, name, x), codec, group_size)
    assert group.memory is not None
    return group.memory.all_reduce(x, chosen, codec, group_size, group.leaves_room)


def _chosen(
    group: Group, x: Tensor, codec: str, group_size: int, algorithm: str, with_norm: bool = False
) -> str:
    """As `choose`; what was asked for and cannot serve is logged once."""
    chosen = choose(group, x, codec, group_size, algorithm, with_norm)
    if chosen != algorithm and algorithm in SERVING and (algorithm, chosen) not in _announced:
        _announced.add((algorithm, chosen))
        logger.info(
            "reductions: %s serves where %s cannot, as for %s of %s%s", chosen, algorithm, tuple(x.shape),
            x.dtype, "" if group.memory else ", since the ranks share no memory",
        )  # fmt: skip
    return chosen
