"""What the states of sequences, and their pages of keys and values, take on one rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ssm_dist.models.batch import StateShapes

PAGE_TOKENS = 16
"""Tokens of keys and values in one page."""


@dataclass(frozen=True)
class StateNeed:
    """Bytes of a state cache on one rank, known before it is allocated."""

    slots: int
    """Convolution and scan states of all slots, the one for padding included."""
    kv_pages: int


def slot_bytes(shapes: StateShapes, dtype: torch.dtype, state_dtype: torch.dtype) -> int:
    """Bytes of one slot on one rank."""
    conv = torch.Size(shapes.conv).numel() * dtype.itemsize
    ssm = torch.Size(shapes.ssm).numel() * state_dtype.itemsize
    return shapes.layers * (conv + ssm)


def state_need(
    shapes: StateShapes, max_sequences: int, max_tokens: int, dtype: torch.dtype, state_dtype: torch.dtype
) -> StateNeed:
    """What `StateCache` with the same arguments will allocate."""
    pages = pages_of(max_tokens) + 1 if shapes.attention_sites else 0
    token = 2 * torch.Size(shapes.kv).numel() * dtype.itemsize * shapes.attention_sites
    slots = max_sequences + 1
    return StateNeed(slots * slot_bytes(shapes, dtype, state_dtype), pages * PAGE_TOKENS * token)


def pages_of(tokens: int) -> int:
    """Pages that so many tokens of one sequence take."""
    return -(-tokens // PAGE_TOKENS)
