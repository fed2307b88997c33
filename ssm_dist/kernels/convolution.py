"""Depthwise causal convolution + SiLU over ragged batches, with the last inputs of each sequence as state."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_dist.kernels import backend
from ssm_dist.kernels.ragged import place_in_sequence, sequence_of_token


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, seq_offsets: Tensor, slots: Tensor
) -> Tensor:
    """y[t] = silu(bias + sum_k weight[:, k] * input[t - (K - 1) + k]), earlier inputs from the slot.

    x:            (T, D) packed tokens; rows may be strided (a view of the packed projection).
    weight, bias: (D, K) and (D,) or None.
    state:        (slots, K - 1, D), oldest input first; the slots named are read, then overwritten in place
                  with the last K - 1 inputs of their sequence, others are left alone.
    seq_offsets:  (S + 1,) int32; slots: (S,) int32, all different. Empty sequences keep their state.
    Returns y (T, D) in x's dtype; accumulation in float32.
    """
    return backend.implementation("causal_conv")(x, weight, bias, state, seq_offsets, slots)


def causal_conv_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor
) -> Tensor:
    """`causal_conv` for exactly one token a sequence: x (S, D), slots (S,); returns (S, D)."""
    return backend.implementation("causal_conv_update")(x, weight, bias, state, slots)


@backend.register("causal_conv", "reference")
def causal_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, seq_offsets: Tensor, slots: Tensor
) -> Tensor:
    """The definition of `causal_conv` in plain torch."""
    tokens, width = x.shape[0], weight.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    before = state[slots.long()]
    sequence = sequence_of_token(seq_offsets, tokens)
    place = place_in_sequence(seq_offsets, sequence)
    total = torch.zeros_like(x, dtype=wide) if bias is None else bias.to(wide).expand(tokens, -1)
    for lag in range(width):
        total = total + weight[:, width - 1 - lag].to(wide) * _lagged(x, before, sequence, place, lag).to(
            wide
        )
    _store_last_inputs(x, before, state, seq_offsets, slots)
    return F.silu(total).to(x.dtype)


def _lagged(x: Tensor, before: Tensor, sequence: Tensor, place: Tensor, lag: int) -> Tensor:
    """The input `lag` tokens earlier in the same sequence: from x, or from the (S, K - 1, D) state before."""
    if lag == 0:
        return x
    index = torch.arange(x.shape[0], device=x.device)
    inside = (place >= lag)[:, None]
    stored = before[sequence, (before.shape[1] - lag + place).clamp(max=before.shape[1] - 1)]
    return torch.where(inside, x[(index - lag).clamp(min=0)], stored.to(x.dtype))


def _store_last_inputs(x: Tensor, before: Tensor, state: Tensor, seq_offsets: Tensor, slots: Tensor) -> None:
    """Write the last K - 1 inputs of each sequence; a short one keeps the tail of what was before it."""
    kept = before.shape[1]
    offsets = seq_offsets.long()
    lengths = offsets[1:] - offsets[:-1]
    place = lengths[:, None] - kept + torch.arange(kept, device=x.device)
    rows = (offsets[:-1, None] + place).clamp(0, max(x.shape[0] - 1, 0))
    old = before.gather(1, (place + kept).clamp(max=kept - 1)[..., None].expand(-1, -1, x.shape[1]))
    new = x[rows].to(state.dtype) if x.shape[0] else old
    state[slots.long()] = torch.where((place >= 0)[..., None], new, old)


@backend.register("causal_conv_update", "reference")
def causal_conv_update_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor
) -> Tensor:
    """The definition of `causal_conv_update` in plain torch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    window = torch.cat([state[slots.long()].to(wide), x.to(wide)[:, None]], dim=1)
    total = torch.einsum("skd,dk->sd", window, weight.to(wide))
    state[slots.long()] = window[:, 1:].to(state.dtype)
    return F.silu(total if bias is None else total + bias.to(wide)).to(x.dtype)
