"""Several ranks in one process: memories that see each other, kernels run one phase after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ssm_dist.kernels import tuning
from ssm_dist.kernels.triton_bulk import PROGRAMS, BulkMemory, bulk_bytes
from ssm_dist.kernels.triton_push import PushMemory, push_bytes


def aligned(size: int, fill: int, device: str = "cpu") -> Tensor:
    """size bytes at a multiple of 16, filled."""
    raw = torch.full((size + 16,), fill, dtype=torch.uint8, device=device)
    return raw[-raw.data_ptr() % 16 :][:size]


def rotated(addresses: list[int], rank: int) -> tuple[int, ...]:
    """As rank sees them: from the next one on around to its own."""
    return tuple(addresses[rank + 1 :] + addresses[: rank + 1])


class PushRanks:
    """The memories of `ranks` ranks, for the push kernels."""

    def __init__(self, ranks: int, slots: int, slot_bytes: int, device: str = "cpu") -> None:
        size = push_bytes(ranks, slots, slot_bytes)
        self.buffers = [aligned(size, 0xFF, device) for _ in range(ranks)]
        addresses = [buffer.data_ptr() for buffer in self.buffers]
        self.memories = [
            PushMemory(
                rank, rotated(addresses, rank), torch.zeros(slots, dtype=torch.int32, device=device),
                torch.zeros(1, dtype=torch.int32, device=device), slot_bytes, limit=10**9,
            )
            for rank in range(ranks)
        ]  # fmt: skip

    @property
    def empty(self) -> bool:
        """Whether everything that was sent has been taken."""
        return all(bool((buffer == 0xFF).all()) for buffer in self.buffers)


class BulkRanks:
    """The memories of `ranks` ranks, for the kernel of long messages; the regions hold rubbish."""

    def __init__(self, ranks: int, capacity: int, device: str = "cpu") -> None:
        size = bulk_bytes(ranks, capacity)
        self.buffers = [aligned(size, 0xAB, device) for _ in range(ranks)]
        for buffer in self.buffers:
            buffer[: size - 2 * capacity] = 0
        addresses = [buffer.data_ptr() for buffer in self.buffers]
        self.memories = [
            BulkMemory(
                rank, rotated(addresses, rank), torch.zeros(PROGRAMS, dtype=torch.int32, device=device),
                torch.zeros(1, dtype=torch.int32, device=device), capacity, limit=10**9,
            )
            for rank in range(ranks)
        ]  # fmt: skip


@contextlib.contextmanager
def words_a_program(dtype: torch.dtype) -> Iterator[None]:
    """Let linear layers take their sums in the order that those have which push."""
    config = {"BLOCK_N": 4 // dtype.itemsize, "AHEAD": 0, "num_warps": 4}
    with tuning.forced("linear_1", config), tuning.forced("linear_4", config):
        yield
