"""Kernels of reductions compiled before they are needed, by processes that have no ranks beside them.

Triton compiles a kernel at its first call, for a second or so, and keeps it on disk for all processes of the
host. Programs that are about to need many can let others call the same reductions inside `compile_only`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from ssm_dist.kernels.codecs import decode_rows, encode_rows, sum_rows
from ssm_dist.parallel.collectives.groups import register_lone_rank
from ssm_dist.parallel.collectives.ops import tp_all_reduce
from ssm_dist.parallel.collectives.shared import memory_at


@contextmanager
def compile_only() -> Iterator[None]:
    """Inside, calls of Triton's kernels compile them and run nothing: results hold anything."""
    run = JITFunction.run

    def compiled(kernel: JITFunction, *args: Any, **options: Any) -> Any:
        return run(kernel, *args, **(options | {"warmup": True}))

    JITFunction.run = compiled
    try:
        yield
    finally:
        JITFunction.run = run


def group_without_others(ranks: int, row_bytes: int, message_bytes: int, device: torch.device) -> str:
    """Name of a group that seems to share memory as `open_shared_memory` would, for use in `compile_only`."""
    group = register_lone_rank(f"compiling {ranks} {row_bytes} {message_bytes}", ranks)
    group.memory = memory_at([2**40] * ranks, group, row_bytes, message_bytes, device)
    return group.name


def compile_sum(x: Tensor, group: str, ranks: int, codec: str, group_size: int, algorithm: str) -> None:
    """Compile what `tp_all_reduce` of x (rows, width) needs, in `compile_only`."""
    if algorithm != "exchange":
        if algorithm != "all_reduce":
            tp_all_reduce(x, group, codec, group_size, algorithm)
        return
    stripe = -(-len(x) // ranks)
    sent = encode_rows(x, codec, group_size, ranks * stripe)
    parts = sent.unflatten(0, (ranks, stripe))
    mine = sum_rows(parts, x.shape[1], x.dtype, codec, group_size, x[:stripe])
    decode_rows(mine, x.shape[1], x.dtype, codec, group_size)
