"""Memory that the GPUs of a group share, and sums over it.

It is opened before anything is captured in a CUDA graph, one for each group. The reductions of a group run
one after the other, on one stream or on several that wait for each other; two at a time need two groups.
"""

from __future__ import annotations

import functools
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssm_dist.kernels import add_rms_norm
from ssm_dist.kernels.codecs import DTYPES
from ssm_dist.kernels.triton_bulk import (
    LINE,
    PROGRAMS,
    BulkMemory,
    bulk_bytes,
    bulk_sum,
    bulk_sum_add_rms_norm,
    rows_that_fit,
)
from ssm_dist.kernels.triton_push import (
    PushMemory,
    push_bytes,
    push_fits,
    push_sum,
    push_sum_add_rms_norm,
)
from ssm_dist.kernels.triton_push_product import (
    product_sum,
    product_sum_add_rms_norm,
    pushes_product,
)
from ssm_dist.kernels.triton_remote import error_words
from ssm_dist.kernels.tuning import multiprocessors
from ssm_dist.parallel.collectives.groups import Group, group_named

LARGEST_REGION = 384 * 2**20
"""Bytes; longer messages are summed block by block."""

BESIDE_A_SCAN = {False: 1, True: 3}
"""Programs a multiprocessor of a long sum that runs beside a scan, without and with a codec, which takes more
instructions: H100 (benchmarks/overlap). More would take the registers that the scan's programs need."""

SMALLEST_SLOT = 4096
SLOTS = {2: 1024, 3: 1024, 4: 1024}
FEWER_SLOTS = 512
"""Rows that can be sent by push: more ranks have more slots a row."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class SharedMemory:
    """What the kernels need, and what keeps it alive."""

    push: PushMemory
    bulk: BulkMemory
    error: Tensor
    """(1,) int32 in pinned host memory: kernels write it when a wait fails, and the host can read it."""
    handle: Any
    """torch's symmetric memory, and the buffer."""

    def holds(self, slots: int, slot_bytes: int, capacity: int) -> bool:
        """Whether it is as large as that."""
        as_many = slots <= self.push.slots
        return as_many and slot_bytes <= self.push.slot_bytes and capacity <= self.bulk.capacity

    def with_limit(self, seconds: float) -> SharedMemory:
        """The same memory, with waits of at most so long."""
        limit = _nanoseconds(seconds)
        return replace(self, push=replace(self.push, limit=limit), bulk=replace(self.bulk, limit=limit))

    def fits(self, algorithm: str, x: Tensor, codec: str, group_size: int, with_norm: bool) -> bool:
        """Whether an algorithm can sum x (rows, width)."""
        rows, width = x.shape
        if algorithm in ("one_shot", "two_shot"):
            return x.dtype in DTYPES and push_fits(rows, width * x.itemsize, self.push, with_norm)
        return x.dtype in DTYPES and rows_that_fit(width, x.dtype, codec, group_size, self.bulk) > 0

    def fits_in_one_block(self, x: Tensor, codec: str, group_size: int) -> bool:
        """Whether one call of the kernel for long messages can sum x (rows, width)."""
        return len(x) <= rows_that_fit(x.shape[1], x.dtype, codec, group_size, self.bulk)

    def all_reduce(
        self, x: Tensor, algorithm: str, codec: str, group_size: int, leaves_room: bool = False
    ) -> Tensor:
        """The sum of every rank's x (rows, width), which fits. leaves_room: for a scan beside it."""
        x = _aligned(x)
        if algorithm != "bulk":
            return push_sum(x, self.push, two_shot=algorithm == "two_shot")
        y, programs = torch.empty_like(x), self._programs(codec, leaves_room)
        most = rows_that_fit(x.shape[1], x.dtype, codec, group_size, self.bulk)
        for rows, into in zip(x.split(most), y.split(most), strict=True):
            bulk_sum(rows, codec, group_size, self.bulk, programs=programs, y=into)
        return y

    def all_reduce_add_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, algorithm: str, codec: str,
        group_size: int, leaves_room: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`kernels.add_rms_norm` of the sum."""
        if algorithm == "bulk":
            total = self.all_reduce(x, "bulk", codec, group_size, leaves_room)
            return add_rms_norm(total, residual, weight, eps)
        residual = None if residual is None else _aligned(residual)
        two_shot = algorithm == "two_shot"
        return push_sum_add_rms_norm(_aligned(x), residual, weight, eps, self.push, two_shot)

    def pushes_product(self, x: Tensor, weight: Tensor, with_norm: bool) -> bool:
        """Whether the linear layer x W^T, x (T, K), weight (N, K), can push its outputs itself."""
        return pushes_product(x, weight, self.push, with_norm)

    def linear_all_reduce(self, x: Tensor, weight: Tensor) -> Tensor:
        """The sum of every rank's x W^T, (T, N), which can push."""
        return product_sum(x, weight, self.push)

    def linear_all_reduce_add_rms_norm(
        self, x: Tensor, weight: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """`kernels.add_rms_norm` of that sum."""
        residual = None if residual is None else _aligned(residual)
        return product_sum_add_rms_norm(x, weight, residual, norm_weight, eps, self.push)

    def split_add_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, codec: str, group_size: int,
        leaves_room: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`bulk_sum_add_rms_norm`, for rows that fit in one block."""
        residual = None if residual is None else _aligned(residual)
        return bulk_sum_add_rms_norm(
            _aligned(x), residual, weight, eps, codec, group_size, self.bulk,
            programs=self._programs(codec, leaves_room),
        )  # fmt: skip

    def _programs(self, codec: str, leaves_room: bool) -> int | None:
        """Of a long sum at most; None: as many as there is room for."""
        if not leaves_room:
            return None
        device = self.bulk.epochs.device
        return BESIDE_A_SCAN[codec != "none"] * multiprocessors(device)


def open_shared_memory(name: str, row_bytes: int, message_bytes: int, device: torch.device) -> bool:
    """Share memory among the ranks of a group; they call it alike. False, with a log line, where they cannot.

    row_bytes, message_bytes: of the longest row, and of the longest message that should go in one piece.
    """
    group = group_named(name)
    sizes = _sizes(group.size, row_bytes, message_bytes)
    if group.memory is not None and group.memory.holds(*sizes):
        group.memory = group.memory.with_limit(group.timeout_seconds)
        return True
    if group.memory is not None:
        group.outgrown.append(group.memory)
    reason = _reason_against(group, device)
    if reason is None:
        group.memory, reason = _open(group, *sizes, device)
    if reason is not None:
        _announce(f"reductions: {group.backend} serves all of them, since {reason}")
    return reason is None


@functools.cache
def _announce(line: str) -> None:
    """Log a line once a process, however many groups it holds for."""
    logger.info(line)


def _sizes(ranks: int, row_bytes: int, message_bytes: int) -> tuple[int, int, int]:
    slot_bytes = max(SMALLEST_SLOT, -(-row_bytes // 128) * 128)
    padding = ranks * (row_bytes + LINE) + message_bytes // row_bytes * LINE
    capacity = min(LARGEST_REGION, -(-(message_bytes + padding) // LINE) * LINE)
    return SLOTS.get(ranks, FEWER_SLOTS), slot_bytes, capacity


def _open(
    group: Group, slots: int, slot_bytes: int, capacity: int, device: torch.device
) -> tuple[SharedMemory | None, str | None]:
    """The memory; or None and why not, on all ranks alike."""
    at_push, size = bulk_bytes(group.size, capacity), push_bytes(group.size, slots, slot_bytes)
    handle, problem = rendezvous(group, at_push + size, lambda b: _clear(b, at_push), device)
    if problem is not None:
        return None, problem
    return _memory_at(list(handle[0].buffer_ptrs), group, slots, slot_bytes, capacity, device, handle), None


def memory_at(
    addresses: list[int], group: Group, row_bytes: int, message_bytes: int, device: torch.device
) -> SharedMemory:
    """What `open_shared_memory` would make of memories at these addresses, by rank."""
    return _memory_at(addresses, group, *_sizes(group.size, row_bytes, message_bytes), device, None)


def _memory_at(
    addresses: list[int], group: Group, slots: int, slot_bytes: int, capacity: int, device: torch.device,
    handle: Any,
) -> SharedMemory:  # fmt: skip
    around = addresses[group.rank + 1 :] + addresses[: group.rank + 1]
    at_push = bulk_bytes(group.size, capacity)
    error = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
    counters = torch.zeros(slots, dtype=torch.int32, device=device)
    epochs = torch.zeros(PROGRAMS, dtype=torch.int32, device=device)
    limit = _nanoseconds(group.timeout_seconds)
    words = error_words(error, device)
    push = PushMemory(group.rank, tuple(a + at_push for a in around), counters, words, slot_bytes, limit)
    bulk = BulkMemory(group.rank, tuple(around), epochs, words, capacity, limit)
    return SharedMemory(push, bulk, error, handle)


def _clear(buffer: Tensor, bulk: int) -> None:
    """Make both parts ready for use."""
    buffer[:bulk].zero_()
    buffer[bulk:].fill_(0xFF)


def rendezvous(
    group: Group, size: int, clear: Callable[[Tensor], object], device: torch.device
) -> tuple[Any, str | None]:
    """torch's symmetric memory with its buffer of `size` bytes, cleared on all ranks; or None, and why not.

    All ranks of the group call it alike, and get memory, or the same reason, alike.
    """
    import torch.distributed._symmetric_memory as symmetric_memory

    made, problem = None, None
    try:
        buffer = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
        clear(buffer)
        torch.cuda.synchronize(device)
        made = symmetric_memory.rendezvous(buffer, group.handle), buffer
    except RuntimeError as error:  # an old driver, a container without the rights, no memory left
        problem = str(error).splitlines()[0]
    problems = [p for p in everybodys(group, problem) if p is not None]  # nobody sends before all are ready
    return (None, f"memory cannot be shared ({problems[0]})") if problems else (made, None)


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def everybodys(group: Group, mine: Any) -> list[Any]:
    """What every rank gives."""
    everybody: list[Any] = [None] * group.size
    dist.all_gather_object(everybody, mine, group=group.handle)
    return everybody


def _reason_against(group: Group, device: torch.device) -> str | None:
    """Why the ranks cannot share memory, the same on all of them; None where they can."""
    everybody = everybodys(group, (socket.gethostname(), device.index))
    if len({host for host, _ in everybody}) > 1:
        return "the ranks are on several hosts"
    visible = torch.cuda.device_count()
    others = {index for _, index in everybody if index != device.index and index < visible}
    blind = [index for index in sorted(others) if not torch.cuda.can_device_access_peer(device, index)]
    found = everybodys(group, blind)
    pairs = [f"{own} to {other}" for (_, own), seen in zip(everybody, found, strict=True) for other in seen]
    return f"GPUs have no access to each other's memory ({', '.join(pairs)})" if pairs else None


def _aligned(x: Tensor) -> Tensor:
    """x, contiguous and at a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
