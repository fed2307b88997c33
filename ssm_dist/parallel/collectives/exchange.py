"""Two-shot over the process group, with a codec: for gloo, and for NCCL where ranks share no memory.

Every rank owns a stripe of the rows. All encode all their rows and send each stripe to its owner; the owner
decodes them, sums in float32 in rank order, and encodes the sum; all gather the encoded sums and decode them,
the owner its own like the others. So all ranks decode the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssm_dist.kernels.codecs import decode_rows, encode_rows, sum_rows
from ssm_dist.parallel.collectives.failures import wait
from ssm_dist.parallel.collectives.gather import all_gather
from ssm_dist.parallel.collectives.groups import Group


def all_reduce(x: Tensor, group: Group, what: str) -> Tensor:
    """The process group's own sum, in a fresh tensor."""
    total = x.clone(memory_format=torch.contiguous_format)
    call = next(group.calls)
    if group.backend == "nccl":
        dist.all_reduce(total, group=group.handle)
    else:
        wait(dist.all_reduce(total, group=group.handle, async_op=True), group, call, what)
    return total


def exchange(x: Tensor, group: Group, codec: str, group_size: int, what: str) -> Tensor:
    """The sum of every rank's x (rows, width), with both trips encoded; of x's dtype."""
    rows, width = x.shape
    stripe = -(-rows // group.size)
    sent = encode_rows(x, codec, group_size, group.size * stripe)
    received = torch.empty_like(sent)
    _move(dist.all_to_all_single, received, sent, group, what)
    parts = received.unflatten(0, (group.size, stripe))
    mine = sum_rows(parts, width, x.dtype, codec, group_size)
    gathered = torch.empty_like(sent)
    _move(all_gather, gathered, mine, group, what)
    return decode_rows(gathered[:rows], width, x.dtype, codec, group_size)


def _move(collective: Callable[..., Any], output: Tensor, given: Tensor, group: Group, what: str) -> None:
    call = next(group.calls)
    if group.backend == "nccl":
        collective(output, given, group=group.handle)
    else:
        wait(collective(output, given, group=group.handle, async_op=True), group, call, what)
