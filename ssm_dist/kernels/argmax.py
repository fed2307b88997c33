"""The largest number of each row, and where it is: greedy sampling."""

import torch
from torch import Tensor

from ssm_dist.kernels import backend


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of each row and its column, as torch.max has them; rows may be strided.

    logits: (S, V) of any float dtype, V at least 1. Returns values (S,) in logits' dtype and ids (S,) int64:
    of the lowest column among equals (0 and -0 are), NaN counting as the largest.
    """
    return backend.implementation("largest")(logits)


@backend.register("largest", "reference")
def largest_reference(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of `largest` in plain torch."""
    values, ids = torch.max(logits, dim=-1)
    return values, ids
