"""Reductions over ranks, as opaque custom ops: eager code, torch.compile and CUDA graphs all take them.

A group travels as a string, since an op takes no process group; `register_group` gives it its name.
"""

import torch
import torch.distributed as dist
from torch import Tensor

_groups: dict[str, dist.ProcessGroup] = {}

# torch 2.13 deprecates the name that 2.11 has
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


def register_group(name: str, group: dist.ProcessGroup) -> str:
    """Make `group` known to the ops below under `name`; returns the name."""
    _groups[name] = group
    return name


@torch.library.custom_op("ssm_dist::tp_all_reduce", mutates_args=())
def tp_all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum of every rank's x over `group`, the same bits on all, in a fresh tensor of x's dtype."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_groups[group])
    return total


@tp_all_reduce.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("ssm_dist::tp_all_gather", mutates_args=())
def tp_all_gather(x: Tensor, group: str, degree: int) -> Tensor:
    """Every rank's columns side by side, in rank order: x (rows, C) -> (rows, degree * C)."""
    parts = x.new_empty((degree * x.shape[0], x.shape[1]))
    _all_gather(parts, x.contiguous(), group=_groups[group])
    return parts.unflatten(0, (degree, -1)).transpose(0, 1).flatten(1)


@tp_all_gather.register_fake
def _(x: Tensor, group: str, degree: int) -> Tensor:
    return x.new_empty((x.shape[0], degree * x.shape[1]))


def tp_all_max(x: Tensor, group: str) -> Tensor:
    """The largest of every rank's x, elementwise, in a fresh tensor."""
    largest = x.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=_groups[group])
    return largest


def broadcast_bytes(data: bytes, group: str, device: torch.device) -> bytes:
    """Rank 0's `data`, on every rank of the group."""
    handle = _groups[group]
    size = torch.tensor([len(data)], device=device)
    dist.broadcast(size, group_src=0, group=handle)
    if int(size) == 0:  # torch.frombuffer refuses an empty buffer
        return b""
    buffer = torch.zeros(int(size), dtype=torch.uint8, device=device)
    if dist.get_rank(handle) == 0:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(buffer, group_src=0, group=handle)
    return buffer.cpu().numpy().tobytes()
