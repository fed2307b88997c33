"""What a step reads from the host, packed into one tensor, so that one copy takes it to the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssm_dist.scheduler import Chunk


class PrefillNumbers(NamedTuple):
    """Views of a packed tensor, all int64: what a part of a prefill step works on."""

    tokens: Tensor
    """(T,)"""
    positions: Tensor
    """(T,), of each token in its own sequence."""
    offsets: Tensor
    """(S + 1,), of the sequences in `tokens`."""
    slots: Tensor
    """(S,)"""


class Shape(NamedTuple):
    """What a part of a prefill step is padded to."""

    tokens: int
    sequences: int

    @property
    def numbers(self) -> int:
        """How many it takes to say what it works on."""
        return 2 * self.tokens + 2 * self.sequences + 1


class Packer:
    """Packs steps in host memory; for a GPU in pinned memory, whose copies need not be waited for."""

    def __init__(self, padding_slot: int, *, pinned: bool) -> None:
        self._padding_slot = padding_slot
        self._pinned = pinned

    def prefill(self, parts: Sequence[list[Chunk]], shapes: Sequence[Shape]) -> Tensor:
        """Chunks of prompts, each part padded to its shape.

        A part's last sequence takes the tokens that pad; they are all in place 0, so that none has a context.
        """
        packed = self._memory(sum(shape.numbers for shape in shapes))
        for chunks, views in zip(parts, unpacked(packed, shapes), strict=True):
            self._fill(views, chunks)
        return packed

    def _fill(self, views: PrefillNumbers, chunks: list[Chunk]) -> None:
        """Write chunks; by NumPy, since torch wakes threads for many numbers, which takes milliseconds."""
        tokens, positions, offsets, slots = (view.numpy() for view in views)
        filled, real = 0, len(chunks)
        for row, chunk in enumerate(chunks):
            offsets[row], slots[row] = filled, chunk.sequence.slot
            here = slice(filled, filled + chunk.length)
            tokens[here] = chunk.tokens.numpy()
            positions[here] = np.arange(chunk.start, chunk.end)
            filled = here.stop
        tokens[filled:] = positions[filled:] = 0
        offsets[real:] = filled
        if len(slots) > real:
            offsets[-1] = len(tokens)
        slots[real:] = self._padding_slot

    def decode(self, slots: list[int], size: int) -> Tensor:
        """(size,) slots, padded with nobody's."""
        packed = self._memory(size)
        packed.numpy()[:] = slots + [self._padding_slot] * (size - len(slots))
        return packed

    def small(self, numbers: list[int]) -> Tensor:
        """Some numbers."""
        packed = self._memory(len(numbers))
        packed.numpy()[:] = numbers
        return packed

    def _memory(self, numbers: int) -> Tensor:
        return torch.empty(numbers, dtype=torch.int64, pin_memory=self._pinned)


def unpacked(packed: Tensor, shapes: Sequence[Shape]) -> list[PrefillNumbers]:
    """The parts of what `Packer.prefill` packed, wherever it is now."""
    parts = packed.split([shape.numbers for shape in shapes])
    return [
        PrefillNumbers(*part.split([tokens, tokens, sequences + 1, sequences]))
        for part, (tokens, sequences) in zip(parts, shapes, strict=True)
    ]


def split(chunks: list[Chunk], tokens: int) -> tuple[list[Chunk], list[Chunk]]:
    """The first so many tokens of some chunks, and the rest: a chunk between them goes into both."""
    first: list[Chunk] = []
    rest: list[Chunk] = []
    for chunk in chunks:
        here = min(chunk.length, tokens)
        tokens -= here
        if here:
            first.append(chunk._replace(length=here))
        if here < chunk.length:
            rest.append(chunk._replace(start=chunk.start + here, length=chunk.length - here))
    return first, rest
