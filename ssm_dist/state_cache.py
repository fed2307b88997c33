"""The memory of sequences in flight: preallocated state slots, and pages of keys and values.

Admission is exact: a sequence takes one slot and, for hybrid models, the pages of all tokens that it may
reach, so a sequence once admitted can always run to its end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssm_dist.models.batch import KVPages, MixerState, ModelState, StateShapes

PAGE_TOKENS = 16
"""Tokens of keys and values in one page."""


@dataclass(frozen=True)
class StateNeed:
    """Bytes of a state cache on one rank, known before it is allocated."""

    slots: int
    """Convolution and scan states of all slots."""
    kv_pages: int


def state_need(
    shapes: StateShapes, max_sequences: int, max_tokens: int, dtype: torch.dtype, state_dtype: torch.dtype
) -> StateNeed:
    """What `StateCache` with the same arguments will allocate."""
    conv = torch.Size(shapes.conv).numel() * dtype.itemsize
    ssm = torch.Size(shapes.ssm).numel() * state_dtype.itemsize
    pages = -(-max_tokens // PAGE_TOKENS) if shapes.attention_sites else 0
    token = 2 * torch.Size(shapes.kv).numel() * dtype.itemsize * shapes.attention_sites
    return StateNeed(max_sequences * shapes.layers * (conv + ssm), pages * PAGE_TOKENS * token)


class StateCache:
    """Slots and pages, who holds them, and the tensors behind them.

    The tensors never move, so that captured graphs can hold on to them. All bookkeeping is on the host and
    depends on the calls alone: ranks that make the same calls hold the same slots.
    """

    def __init__(
        self,
        shapes: StateShapes,
        *,
        max_sequences: int,
        max_tokens: int,
        dtype: torch.dtype,
        state_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """dtype is that of the convolution's inputs, keys and values; state_dtype that of the scan's states.

        max_tokens bounds the keys and values over all sequences; models without attention ignore it.
        """
        self._conv = torch.zeros(shapes.layers, max_sequences, *shapes.conv, dtype=dtype, device=device)
        self._ssm = torch.zeros(shapes.layers, max_sequences, *shapes.ssm, dtype=state_dtype, device=device)
        pages = -(-max_tokens // PAGE_TOKENS) if shapes.attention_sites else 0
        kv_shape = (shapes.attention_sites, 2, pages, PAGE_TOKENS, *shapes.kv)
        self._kv = torch.zeros(kv_shape, dtype=dtype, device=device)
        self.state = ModelState(
            [MixerState(conv, ssm) for conv, ssm in zip(self._conv, self._ssm, strict=True)],
            [KVPages(*site) for site in self._kv],
        )
        self.paged = shapes.attention_sites > 0
        self.max_sequences = max_sequences
        self.max_tokens = pages * PAGE_TOKENS
        self._free_slots = list(reversed(range(max_sequences)))
        self._free_pages = list(reversed(range(pages)))
        self._pages: dict[int, list[int]] = {}

    @property
    def bytes_allocated(self) -> int:
        """Bytes of slots and pages on this rank."""
        return self._conv.nbytes + self._ssm.nbytes + self._kv.nbytes

    @property
    def free_slots(self) -> int:
        """Slots that nobody holds."""
        return len(self._free_slots)

    def acquire(self, tokens: int) -> int | None:
        """A zeroed slot for a sequence of at most `tokens` tokens, or None while there is no room for it."""
        pages = -(-tokens // PAGE_TOKENS) if self.paged else 0
        if not self._free_slots or pages > len(self._free_pages):
            return None
        slot = self._free_slots.pop()
        self._pages[slot] = [self._free_pages.pop() for _ in range(pages)]
        self._conv[:, slot] = 0
        self._ssm[:, slot] = 0
        return slot

    def release(self, slot: int) -> None:
        """Give back a slot and its pages."""
        self._free_pages += reversed(self._pages.pop(slot))
        self._free_slots.append(slot)

    def page_table(self, slots: list[int]) -> Tensor | None:
        """Pages of each slot, (S, P) int32 on the device, short rows filled up with 0; None without pages."""
        if not self.paged:
            return None
        width = max(len(self._pages[slot]) for slot in slots)
        rows = [self._pages[slot] + [0] * (width - len(self._pages[slot])) for slot in slots]
        return torch.tensor(rows, dtype=torch.int32).to(self._kv.device, non_blocking=True)
