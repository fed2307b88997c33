"""Error feedback: what a codec drops of a branch is added to the next branch of the same residual stream.

Without it, every layer's rounding stays in the stream, and they add up. With it, the stream lacks what the
last reduction dropped, and no more: after layers 1 ... l it is the exact sum of their branches but for the
errors of layer l. Each rank keeps what encoding its parts dropped, and the owner of some rows what encoding
and rounding their sums did, in the branch's dtype. So the errors belong to a stream: they travel with the
tensor that holds it, and a norm of the stream and something else, as in Zamba's hybrid layers, leaves them.

Sums that are too short for the codec go without, and a norm without a stream has nothing to feed back to.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ssm_dist.parallel.collectives import Reductions, goes_encoded, tp_all_reduce_with_feedback

_errors = WeakTensorKeyDictionary()
"""Residual stream -> errors of the last reduction that was added to it."""


def feeds_back(branch: Tensor, group: str, reductions: Reductions, *, with_norm: bool) -> bool:
    """Whether the sum of a branch (T, H) is one with error feedback: where its codec would serve without."""
    wire = reductions.branch
    how = (wire.codec, wire.group_size, wire.algorithm)
    return reductions.feedback and goes_encoded(branch, group, *how, with_norm)


def sum_with_feedback(
    branch: Tensor, stream: Tensor, group: str, reductions: Reductions
) -> tuple[Tensor, Callable[[Tensor], None]]:
    """The sum of every rank's branch (T, H), and what to call with the stream once it is added to that."""
    wire = reductions.branch
    total, errors = tp_all_reduce_with_feedback(
        branch, _errors.get(stream), group, wire.codec, wire.group_size
    )

    def added(new_stream: Tensor) -> None:
        _errors[new_stream] = errors

    return total, added
