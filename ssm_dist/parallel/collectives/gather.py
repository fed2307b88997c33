"""What crosses ranks besides sums: gathered columns and rows, maxima, bytes of rank 0."""

import torch
import torch.distributed as dist
from torch import Tensor

from ssm_dist.kernels.operators import operator
from ssm_dist.parallel.collectives.groups import group_named

# torch 2.13 deprecates the name that 2.11 has
all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


def _like_gathered(x: Tensor, group: str, degree: int) -> Tensor:
    return x.new_empty((x.shape[0], degree * x.shape[1]))


@operator("tp_all_gather", fake=_like_gathered)
def tp_all_gather(x: Tensor, group: str, degree: int) -> Tensor:
    """Every rank's columns side by side, in rank order: x (rows, C) -> (rows, degree * C)."""
    parts = x.new_empty((degree * x.shape[0], x.shape[1]))
    all_gather(parts, x.contiguous(), group=group_named(group).handle)
    return parts.unflatten(0, (degree, -1)).transpose(0, 1).flatten(1)


def _like_rows(x: Tensor, rows: int, group: str, degree: int) -> Tensor:
    return x.new_empty((rows, x.shape[1]))


@operator("tp_gather_rows", fake=_like_rows)
def tp_gather_rows(x: Tensor, rows: int, group: str, degree: int) -> Tensor:
    """Every rank's stripe of some rows one after the other: x (ceil(rows / degree), C) -> (rows, C)."""
    ranks = group_named(group)
    ranks.next_call()
    stripes = x.new_empty((degree * x.shape[0], x.shape[1]))
    all_gather(stripes, x.contiguous(), group=ranks.handle)
    return stripes[:rows]


def tp_all_max(x: Tensor, group: str) -> Tensor:
    """The largest of every rank's x, elementwise, in a fresh tensor."""
    largest = x.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group_named(group).handle)
    return largest


def broadcast_bytes(data: bytes, group: str, device: torch.device) -> bytes:
    """Rank 0's `data`, on every rank of the group."""
    handle = group_named(group).handle
    size = torch.tensor([len(data)], device=device)
    dist.broadcast(size, group_src=0, group=handle)
    if int(size) == 0:  # torch.frombuffer refuses an empty buffer
        return b""
    if dist.get_rank(handle) == 0:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
        dist.broadcast(buffer, group_src=0, group=handle)
        return data
    buffer = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(buffer, group_src=0, group=handle)
    return buffer.cpu().numpy().tobytes()
