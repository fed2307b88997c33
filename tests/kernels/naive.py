"""The ops once more, as loops over tokens in float64: slow, obvious, and written apart from the product.

Each takes the arguments of its public function and returns its output and the states that it would leave.
"""

from itertools import pairwise

import torch
from torch import Tensor


def _bounds(seq_offsets: Tensor) -> list[tuple[int, int]]:
    offsets = seq_offsets.tolist()
    return list(pairwise(offsets))


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, seq_offsets: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """Output (T, D) and conv state (slots, K - 1, D), in float64."""
    x, weight, state = x.double(), weight.double(), state.double().clone()
    y = torch.empty_like(x)
    for slot, (start, end) in zip(slots.tolist(), _bounds(seq_offsets), strict=True):
        for t in range(start, end):
            window = torch.cat([state[slot], x[t : t + 1]])
            y[t] = (weight.T * window).sum(0) + (0 if bias is None else bias.double())
            state[slot] = window[1:]
    return _silu(y), state


def selective_scan(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    state: Tensor, seq_offsets: Tensor, slots: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (T, D) and SSM state (slots, D, N), in float64."""
    x, dt, A_log, B, C, D, z, dt_bias = (t.double() for t in (x, dt, A_log, B, C, D, z, dt_bias))
    state = state.double().clone()
    y = torch.empty_like(x)
    group = torch.arange(x.shape[1]) * B.shape[1] // x.shape[1]
    for slot, (start, end) in zip(slots.tolist(), _bounds(seq_offsets), strict=True):
        for t in range(start, end):
            step = torch.logaddexp(dt[t] + dt_bias, torch.zeros(()))[:, None]
            decay = torch.exp(-step * torch.exp(A_log))
            state[slot] = decay * state[slot] + step * B[t, group] * x[t, :, None]
            y[t] = ((C[t, group] * state[slot]).sum(1) + D * x[t]) * _silu(z[t])
    return y, state


def paged_attention(
    query: Tensor, key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor,
    seq_offsets: Tensor, positions: Tensor, pages: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output (T, heads, head_dim), the key pages and the value pages, in float64."""
    keys, values = key_pages.double().clone(), value_pages.double().clone()
    size, out = keys.shape[1], torch.empty_like(query, dtype=torch.float64)
    for s, (start, end) in enumerate(_bounds(seq_offsets)):
        for t in range(start, end):
            place = int(positions[t])
            page, row = int(pages[s, place // size]), place % size
            keys[page, row], values[page, row] = key[t].double(), value[t].double()
            seen = [(int(pages[s, p // size]), p % size) for p in range(place + 1)]
            scores = torch.stack([(query[t].double() * keys[at]).sum(-1) for at in seen]) * scale
            shares = torch.exp(scores - scores.amax(0))
            shares = shares / shares.sum(0)
            out[t] = sum(share[:, None] * values[at] for share, at in zip(shares, seen, strict=True))
    return out, keys, values


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x over its root mean square along the last axis, in float64."""
    x = x.double()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
