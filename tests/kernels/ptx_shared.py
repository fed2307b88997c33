"""Shared memory and asynchronous copies for `ptx_emulator`, of blocks of one warp.

A copy lands as late as the program allows: when its thread waits for its group, with what is in global
memory then. Until a byte is written, reading it raises. So a wait that comes too late, or a stage that is
filled while it is still read, shows in the numbers or as an error. Barriers of one warp that runs in lockstep
do nothing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

BYTES = 1 << 16
"""Of each block; more than any kernel here takes."""


@dataclass(frozen=True)
class Copy:
    """One copy of each thread: so many bytes, of which those after `given` become zero."""

    targets: NDArray[Any]
    sources: NDArray[Any]
    size: int
    given: NDArray[Any]
    taking_part: NDArray[Any]


@dataclass
class Shared:
    """Of some blocks of 32 threads, a row of bytes each, with the copies that are under way."""

    blocks: int
    bytes: NDArray[Any] = field(init=False)
    written: NDArray[Any] = field(init=False)
    groups: list[list[Copy]] = field(default_factory=list)
    latest: list[Copy] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bytes = np.zeros((self.blocks, BYTES), np.uint8)
        self.written = np.zeros((self.blocks, BYTES), np.bool_)

    def part(self, threads: NDArray[Any]) -> Shared:
        """That of the blocks of these threads, which are all of theirs or none."""
        other = copy.copy(self)
        chosen = threads[::32]
        other.blocks = int(chosen.sum())
        other.bytes, other.written = self.bytes[chosen], self.written[chosen]

        def of(c: Copy) -> Copy:
            arrays = (c.targets, c.sources, c.given, c.taking_part)
            targets, sources, given, taking_part = (a[threads] for a in arrays)
            return Copy(targets, sources, c.size, given, taking_part)

        other.groups = [[of(c) for c in group] for group in self.groups]
        other.latest = [of(c) for c in self.latest]
        return other

    def _cells(self, addresses: NDArray[Any], size: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Row and columns of all bytes; addresses are a thread's each."""
        if (addresses % size).any() or (addresses < 0).any() or (addresses + size > BYTES).any():
            raise IndexError("an address in shared memory is not a multiple of its size, or out of bounds")
        return np.arange(len(addresses))[:, None] // 32, addresses[:, None] + np.arange(size)

    def load(self, addresses: NDArray[Any], size: int) -> NDArray[Any]:
        """The bytes, (threads, size)."""
        cells = self._cells(addresses, size)
        if not self.written[cells].all():
            raise IndexError("shared memory is read before it is written")
        found: NDArray[Any] = self.bytes[cells]
        return found

    def commit(self) -> None:
        """Close a group of copies."""
        self.groups.append(self.latest)
        self.latest = []

    def wait(self, pending: int, memory: NDArray[Any], given: NDArray[Any]) -> None:
        """Let all groups land but the last `pending`; `memory` is global, `given` says what of it exists."""
        while len(self.groups) > pending:
            for c in self.groups.pop(0):
                rows, columns = self._cells(c.targets, c.size)
                wanted = (np.arange(c.size) < c.given[:, None]) & c.taking_part[:, None]
                places = np.where(wanted, c.sources[:, None] + np.arange(c.size), 0)
                if (places >= len(given)).any() or (places < 0).any() or not given[places[wanted]].all():
                    raise IndexError("an address lies outside all tensors")
                took = np.flatnonzero(c.taking_part)
                self.bytes[rows[took], columns[took]] = np.where(wanted, memory[places], 0)[took]
                self.written[rows[took], columns[took]] = True
