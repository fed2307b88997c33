"""What a step reads from the host, packed into one tensor, so that one copy takes it to the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssm_dist.scheduler import Chunk


class PrefillNumbers(NamedTuple):
    """Views of a packed tensor, all int64: the parts of a prefill step."""

    tokens: Tensor
    """(T,)"""
    positions: Tensor
    """(T,), of each token in its own sequence."""
    offsets: Tensor
    """(S + 1,), of the sequences in `tokens`."""
    slots: Tensor
    """(S,)"""


class Packer:
    """Packs steps in host memory; for a GPU in pinned memory, whose copies need not be waited for."""

    def __init__(self, padding_slot: int, *, pinned: bool) -> None:
        self._padding_slot = padding_slot
        self._pinned = pinned

    def prefill(self, chunks: list[Chunk], tokens: int, sequences: int) -> Tensor:
        """Chunks of prompts, padded to so many tokens and sequences.

        The last sequence takes the tokens that pad; they are all in place 0, so that none has a context.
        """
        packed = torch.zeros(2 * tokens + 2 * sequences + 1, dtype=torch.int64, pin_memory=self._pinned)
        parts, real = unpacked(packed, tokens, sequences), len(chunks)
        rows = [(c.start, c.length, c.sequence.slot) for c in chunks]
        starts, lengths, slots = torch.tensor(rows, dtype=torch.int64).view(real, 3).T
        ends = lengths.cumsum(0)
        filled = sum(c.length for c in chunks)
        if chunks:
            torch.cat([c.tokens for c in chunks], out=parts.tokens[:filled])
        places = torch.arange(filled) + (starts + lengths - ends).repeat_interleave(lengths)
        parts.positions[:filled] = places
        parts.offsets[1 : real + 1] = ends
        parts.offsets[real + 1 :] = filled
        if sequences > real:
            parts.offsets[-1] = tokens
        parts.slots[:real] = slots
        parts.slots[real:] = self._padding_slot
        return packed

    def decode(self, slots: list[int], size: int) -> Tensor:
        """(size,) slots, padded with nobody's."""
        packed = torch.full((size,), self._padding_slot, dtype=torch.int64, pin_memory=self._pinned)
        packed[: len(slots)] = torch.tensor(slots, dtype=torch.int64)
        return packed


def unpacked(packed: Tensor, tokens: int, sequences: int) -> PrefillNumbers:
    """The parts of what `Packer.prefill` packed, wherever it is now."""
    return PrefillNumbers(*packed.split([tokens, tokens, sequences + 1, sequences]))
