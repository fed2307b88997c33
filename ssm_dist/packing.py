"""What a step reads from the host, packed into one tensor, so that one copy takes it to the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
        numbers = sum(shape.numbers for shape in shapes)
        packed = torch.zeros(numbers, dtype=torch.int64, pin_memory=self._pinned)
        for chunks, views in zip(parts, unpacked(packed, shapes), strict=True):
            self._fill(views, chunks)
        return packed

    def _fill(self, views: PrefillNumbers, chunks: list[Chunk]) -> None:
        """Write chunks into zeros."""
        real, filled = len(chunks), sum(c.length for c in chunks)
        rows = [(c.start, c.length, c.sequence.slot) for c in chunks]
        starts, lengths, slots = torch.tensor(rows, dtype=torch.int64).view(real, 3).T
        ends = lengths.cumsum(0)
        if chunks:
            torch.cat([c.tokens for c in chunks], out=views.tokens[:filled])
        places = torch.arange(filled) + (starts + lengths - ends).repeat_interleave(lengths)
        views.positions[:filled] = places
        views.offsets[1 : real + 1] = ends
        views.offsets[real + 1 :] = filled
        if len(views.slots) > real:
            views.offsets[-1] = len(views.tokens)
        views.slots[:real] = slots
        views.slots[real:] = self._padding_slot

    def decode(self, slots: list[int], size: int) -> Tensor:
        """(size,) slots, padded with nobody's."""
        packed = torch.full((size,), self._padding_slot, dtype=torch.int64, pin_memory=self._pinned)
        packed[: len(slots)] = torch.tensor(slots, dtype=torch.int64)
        return packed


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
