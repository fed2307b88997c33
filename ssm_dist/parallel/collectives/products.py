"""Linear layers and the sum of their outputs over ranks as one operator, for the few rows of a decode step.

Over memory that the ranks share, the linear layer's kernel pushes its outputs to all ranks as it makes them
(`kernels.triton_push_product`). All ranks get the same bits; but for the order of a product's sum, those of
`kernels.linear` and a one-shot `tp_all_reduce`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ssm_dist.kernels import backend
from ssm_dist.kernels.linear import empty_outputs
from ssm_dist.kernels.operators import operator
from ssm_dist.parallel.collectives.groups import group_named, is_registered
from ssm_dist.parallel.collectives.ops import like_normed
from ssm_dist.parallel.collectives.selection import Wire, is_one_shot

if TYPE_CHECKING:
    from ssm_dist.parallel.collectives.shared import SharedMemory


def pushes_product(x: Tensor, weight: Tensor, group: str, wire: Wire, *, with_norm: bool) -> bool:
    """Whether the sum over `group` of x W^T, x (T, K), weight (N, K), is for the operators of this file.

    with_norm: with residual and norm. By static sizes, so that all ranks agree.
    """
    if not is_registered(group) or backend.serving("linear") != "triton":
        return False
    ranks = group_named(group)
    if ranks.memory is None or not ranks.memory.pushes_product(x, weight, with_norm):
        return False
    outputs = x.new_empty((len(x), len(weight)), device="meta")
    return is_one_shot(ranks, outputs, wire, with_norm)


def _like_outputs(x: Tensor, weight: Tensor, group: str) -> Tensor:
    return empty_outputs(x, weight)


@operator("tp_linear_all_reduce", fake=_like_outputs)
def tp_linear_all_reduce(x: Tensor, weight: Tensor, group: str) -> Tensor:
    """The sum of every rank's x W^T over `group`, the same bits on all: x (T, K), weight (N, K); (T, N).

    Only where `pushes_product`. Raises `RankFailure` when a rank does not take part in time.
    """
    return _memory(group).linear_all_reduce(x, weight)


def _like_normed(
    x: Tensor, weight: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, group: str
) -> tuple[Tensor, Tensor]:
    return like_normed(empty_outputs(x, weight), residual, norm_weight, eps, group)


@operator("tp_linear_all_reduce_add_rms_norm", fake=_like_normed)
def tp_linear_all_reduce_add_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, group: str
) -> tuple[Tensor, Tensor]:
    """`kernels.add_rms_norm` of that sum; residual (T, N) float32 or None, norm_weight (N,) of x's dtype."""
    return _memory(group).linear_all_reduce_add_rms_norm(x, weight, residual, norm_weight, eps)


def _memory(group: str) -> SharedMemory:
    ranks = group_named(group)
    ranks.next_call()
    assert ranks.memory is not None, "ask pushes_product first"
    return ranks.memory
