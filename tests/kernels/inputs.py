"""Random arguments of the ops over ragged batches."""

from typing import Any

import torch
from torch import Tensor

SLOTS = 12
"""State slots, at least."""


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def slots_for(count: int) -> int:
    """State slots, one for each sequence and SLOTS at least."""
    return max(SLOTS, count)


def some_slots(count: int) -> Tensor:
    """Different slots in no order."""
    return torch.randperm(slots_for(count), dtype=torch.int32)[:count]


def conv_inputs(
    lengths: list[int], channels: int = 5, width: int = 4, dtype: torch.dtype = torch.float64
) -> list[Any]:
    """Arguments of `causal_conv`; x is a view of a packed projection, as the mixer gives it."""
    x = torch.randn(sum(lengths), 2 * channels, dtype=dtype)[:, :channels]
    weight, bias = torch.randn(channels, width, dtype=dtype), torch.randn(channels, dtype=dtype)
    state = torch.randn(slots_for(len(lengths)), width - 1, channels, dtype=dtype)
    return [x, weight, bias, state, offsets_of(lengths), some_slots(len(lengths))]


def scan_inputs(
    lengths: list[int],
    channels: int = 6,
    states: int = 16,
    groups: int = 1,
    dtype: torch.dtype = torch.float64,
) -> list[Any]:
    """Arguments of `selective_scan`; x, dt and z are strided views, B and C too."""
    tokens, wide = sum(lengths), torch.promote_types(dtype, torch.float32)
    x, dt, z = torch.randn(tokens, 3 * channels, dtype=dtype).chunk(3, dim=1)
    B, C = torch.randn(tokens, groups, 2 * states, dtype=dtype).chunk(2, dim=2)
    A_log, D = torch.randn(channels, states, dtype=wide), torch.randn(channels, dtype=wide)
    dt_bias = torch.randn(channels, dtype=wide) - 1
    state = torch.randn(slots_for(len(lengths)), channels, states, dtype=wide)
    return [x, dt, A_log, B, C, D, z, dt_bias, state, offsets_of(lengths), some_slots(len(lengths))]


def projected_update_inputs(
    sequences: int, channels: int, rank: int, groups: int, dtype: torch.dtype, states: int = 16
) -> list[Any]:
    """Arguments of `projected_state_update` but the epsilon, with offsets before the slots.

    `given` and z are views; there are four slots more than sequences.
    """
    x, _, A_log, B, _, D, z, bias, state, offsets, _ = scan_inputs(
        [1] * sequences, channels, states, groups, dtype
    )
    state = torch.randn(sequences + 4, channels, states, dtype=state.dtype)
    slots = torch.randperm(len(state), dtype=torch.int32)[:sequences]
    given = torch.randn(sequences, groups, rank + 2 * B.shape[2] + 3).to(dtype)[..., 3:]
    weight = (torch.randn(channels, rank) / rank**0.5).to(dtype)
    return [x, given, weight, A_log, D, z, bias, state, offsets, slots]


def attention_inputs(
    lengths: list[int], before: list[int], heads: int, head_dim: int, page_size: int, dtype: torch.dtype
) -> list[Any]:
    """Arguments of `paged_attention` for new tokens after `before` old ones; everything unused is NaN.

    Pages are dealt from a shuffled deck, so that neighbours in the table are not neighbours in memory.
    """
    counts = [-(-(n + b) // page_size) for n, b in zip(lengths, before, strict=True)]
    deck = torch.randperm(sum(counts) + 3, dtype=torch.int32).tolist()
    pages = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int32)
    key_pages, value_pages = torch.full((2, len(deck), page_size, heads, head_dim), torch.nan, dtype=dtype)
    for s, count in enumerate(counts):
        pages[s, :count] = torch.tensor([deck.pop() for _ in range(count)], dtype=torch.int32)
        for p in range(before[s]):
            at = (int(pages[s, p // page_size]), p % page_size)
            key_pages[at], value_pages[at] = torch.randn(2, heads, head_dim, dtype=dtype)
    query, key, value = torch.randn(3, sum(lengths), heads, head_dim, dtype=dtype)
    positions = torch.cat([torch.arange(b, b + n) for n, b in zip(lengths, before, strict=True)])
    scale = (head_dim / 2) ** -0.5
    return [query, key, value, key_pages, value_pages, offsets_of(lengths), positions, pages, scale]
