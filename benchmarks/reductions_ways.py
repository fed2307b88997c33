"""The ways of a reduction that `reductions.py` compares, as calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssm_dist.kernels import add_rms_norm, rms_normalize
from ssm_dist.kernels.norm import add_rms_norm_reference
from ssm_dist.parallel import TensorParallel
from ssm_dist.parallel.collectives import (
    splits_residual,
    sums_in_place,
    tp_all_reduce,
    tp_all_reduce_add_rms_norm,
    tp_all_reduce_add_rms_norm_split,
    tp_all_reduce_spent,
)

Run = Callable[[], Tensor]
Way = tuple[str, int, Any]
"""Codec, group size, algorithm."""

WAYS: dict[str, Way] = {
    "nccl": ("none", 128, "nccl"),
    "all_reduce": ("none", 128, "all_reduce"),
    "one_shot": ("none", 128, "one_shot"),
    "two_shot": ("none", 128, "two_shot"),
    "bulk": ("none", 128, "bulk"),
    "bulk int8/128": ("int8", 128, "bulk"),
    "bulk int8/32": ("int8", 32, "bulk"),
    "bulk fp8/128": ("fp8", 128, "bulk"),
    "bulk int4/32": ("int4", 32, "bulk"),
    "exchange int8/128": ("int8", 128, "exchange"),
    "exchange fp8/128": ("fp8", 128, "exchange"),
    "exchange int4/32": ("int4", 32, "exchange"),
    "auto": ("none", 128, "auto"),
    "auto int8/128": ("int8", 128, "auto"),
}


def plain_run(x: Tensor, tp: TensorParallel, codec: str, group_size: int, algorithm: str) -> Run:
    """The sum of x. In place, as NCCL's is: of x the first time, then of zeros, which stay finite."""
    how, buffer = (tp.group, codec, group_size, algorithm), x.clone()
    if algorithm != "nccl" and not _in_place(x, tp, codec, group_size, algorithm):
        return lambda: tp_all_reduce(x, *how)

    def in_place() -> Tensor:
        if algorithm != "nccl":
            return tp_all_reduce_spent(buffer, *how)
        dist.all_reduce(buffer, group=tp.mesh.get_group())
        return buffer

    first = [in_place().clone()]
    buffer.zero_()
    return lambda: first.pop() if first else in_place()


def _in_place(x: Tensor, tp: TensorParallel, codec: str, group_size: int, algorithm: str) -> bool:
    """Whether a model's own sum would be; `all_reduce` shows what the operator costs, which is not."""
    return algorithm == "auto" and sums_in_place(x, tp.group, codec, group_size, algorithm)


def small_run(x: Tensor, tp: TensorParallel, codec: str, group_size: int, algorithm: str) -> Run:
    """`normalised` of the sum of x."""
    run = plain_run(x, tp, codec, group_size, algorithm)
    return lambda: normalised(run())


def normalised(x: Tensor) -> Tensor:
    """dt, B and C of falcon-mamba-7b (rows, 256 + 16 + 16), each normalised."""
    return torch.cat([rms_normalize(part, 1e-6) for part in x.split([256, 16, 16], 1)], 1)


def norm_inputs(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Alike on all ranks: float32 (rows, width), and ones in bfloat16."""
    generator = torch.Generator(device=device).manual_seed(5)
    residual = torch.randn(rows, width, device=device, generator=generator)
    return residual, torch.ones(width, device=device, dtype=torch.bfloat16)


def normed(residual: Tensor, weight: Tensor, whole: Tensor) -> Tensor:
    """What `fused_run` makes of the sum `whole`."""
    return add_rms_norm_reference(whole, residual, weight.float(), 1e-5)[0]


def sharded_residual(residual: Tensor, tp: TensorParallel) -> Tensor:
    """This rank's stripe of the rows, filled up with zeros."""
    stripe = -(-len(residual) // tp.degree)
    own = residual[tp.rank * stripe :][:stripe].contiguous()
    return torch.nn.functional.pad(own, (0, 0, 0, stripe - len(own)))


def fused_run(residual: Tensor, weight: Tensor) -> Callable[..., Run]:
    """Sums with residual and norm; where it stays split, the residual is this rank's stripe."""

    def make(x: Tensor, tp: TensorParallel, codec: str, group_size: int, algorithm: str) -> Run:
        args, how = (weight, 1e-5, tp.group), (codec, group_size, algorithm)
        if algorithm == "nccl" or _in_place(x, tp, *how):
            run = plain_run(x, tp, *how)
            return lambda: add_rms_norm(run(), residual, weight, 1e-5)[0]
        own = sharded_residual(residual, tp)
        long = len(x) >= tp.degree and (algorithm in ("bulk", "exchange"))
        if long or (algorithm == "auto" and splits_residual(x, tp.group, *how)):
            return lambda: tp_all_reduce_add_rms_norm_split(x, own, *args, tp.degree, *how)[0]
        return lambda: tp_all_reduce_add_rms_norm(x, residual, *args, *how)[0]

    return make
