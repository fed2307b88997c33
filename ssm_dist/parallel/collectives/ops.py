"""The reductions as opaque custom ops."""

import torch
from torch import Tensor

from ssm_dist.kernels import add_rms_norm
from ssm_dist.parallel.collectives.exchange import all_reduce, exchange
from ssm_dist.parallel.collectives.groups import Group, group_named
from ssm_dist.parallel.collectives.selection import choose


@torch.library.custom_op("ssm_dist::tp_all_reduce", mutates_args=())
def tp_all_reduce(
    x: Tensor, group: str, codec: str = "none", group_size: int = 128, algorithm: str = "auto"
) -> Tensor:
    """The sum of every rank's x (..., width) over `group`, the same bits on all; a fresh tensor of x's dtype.

    codec, group_size: see `ssm_dist.kernels.codecs`; x must then be float32, bfloat16 or float16. algorithm:
    see `selection`. Raises `RankFailure` when a rank does not take part in time.
    """
    return _reduced(x, group_named(group), codec, group_size, algorithm, "all-reduce")


@tp_all_reduce.register_fake
def _(x: Tensor, group: str, codec: str = "none", group_size: int = 128, algorithm: str = "auto") -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("ssm_dist::tp_all_reduce_add_rms_norm", mutates_args=())
def tp_all_reduce_add_rms_norm(
    partial: Tensor, residual: Tensor | None, weight: Tensor, eps: float, group: str,
    codec: str = "none", group_size: int = 128, algorithm: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`kernels.add_rms_norm` of the sum of every rank's partial (T, H), the same bits on all ranks.

    The rest as in `tp_all_reduce`.
    """
    whole = _reduced(partial, group_named(group), codec, group_size, algorithm, "all-reduce with norm")
    return add_rms_norm(whole, residual, weight, eps)


@tp_all_reduce_add_rms_norm.register_fake
def _(
    partial: Tensor, residual: Tensor | None, weight: Tensor, eps: float, group: str,
    codec: str = "none", group_size: int = 128, algorithm: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(partial.dtype, torch.float32)
    return partial.new_empty(partial.shape, dtype=weight.dtype), partial.new_empty(partial.shape, dtype=wide)


def _reduced(x: Tensor, group: Group, codec: str, group_size: int, algorithm: str, name: str) -> Tensor:
    if group.size == 1 or x.numel() == 0:
        return x.clone(memory_format=torch.contiguous_format)
    what = f"{name} of {tuple(x.shape)} {str(x.dtype)[6:]}"
    if choose(group, codec, algorithm) == "all_reduce":
        return all_reduce(x, group, what)
    return exchange(x.reshape(-1, x.shape[-1]), group, codec, group_size, what).view(x.shape)
