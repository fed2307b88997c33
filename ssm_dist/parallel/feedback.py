"""Error feedback: what a codec drops of a branch is added to the next branch of the same residual stream.

Without it, every layer's rounding stays in the stream, and they add up. With it, the stream lacks what the
last reduction dropped, and no more: after layers 1 ... l it is the exact sum of their branches but for the
errors of layer l. Each rank keeps what encoding its parts dropped, and the owner of some rows what encoding
their sums did, in the branch's dtype. So the errors belong to a stream: they travel with the tensor that
holds it, and a norm of the stream and something else, as in Zamba's hybrid layers, leaves them alone.

A norm without a stream has nothing to feed back to; compiled steps and sums that are too short for a codec go
without.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ssm_dist.parallel.collectives import Wire, quantises, tp_all_reduce_with_feedback

_errors = WeakTensorKeyDictionary()
"""Residual stream -> errors of the last reduction that was added to it."""


def feeds_back(branch: Tensor, stream: Tensor | None, group: str, wire: Wire) -> bool:
    """Whether the sum of a branch (T, H) that is added to `stream` is one with feedback."""
    if not wire.feedback or stream is None or torch.compiler.is_compiling():
        return False
    return quantises(branch, group, wire.codec, wire.group_size, wire.algorithm)


class SumWithFeedback:
    """The sum of every rank's branch (T, H), and the errors that it leaves to the stream it is added to."""

    def __init__(self, branch: Tensor, stream: Tensor, group: str, degree: int, wire: Wire) -> None:
        part_error, sum_error = _errors.get(stream, (None, None))
        self.total, *self._left = tp_all_reduce_with_feedback(
            branch, part_error, sum_error, group, degree, wire.codec, wire.group_size
        )

    def added_to(self, stream: Tensor) -> None:
        """`stream` is the new stream, this sum in it."""
        _errors[stream] = tuple(self._left)
