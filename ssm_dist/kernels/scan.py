"""The selective scan of Mamba-1 over ragged batches, and its one-token step.

With s the state of one channel (N numbers), as in the Mamba paper (arXiv 2312.00752, algorithm 2):

    dt  = softplus(dt + dt_bias)
    s_t = exp(dt_t * A) * s_{t-1} + dt_t * B_t * x_t          A = -exp(A_log)
    y_t = (C_t . s_t + D * x_t) * silu(z_t)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_dist.kernels import backend
from ssm_dist.kernels.linear import linear_by_head
from ssm_dist.kernels.norm import rms_normalize
from ssm_dist.kernels.ragged import place_in_sequence, sequence_of_token

TIME_BLOCK = 32
"""Tokens that the reference scan combines at once; bounds its memory at TIME_BLOCK * D * N numbers."""


def selective_scan(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    state: Tensor, seq_offsets: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    """The gated output of the recurrence, each sequence continuing from its slot and leaving its end there.

    x, dt, z:    (T, D); rows may be strided.        dt_bias, D: (D,)        A_log: (D, N)
    B, C:        (T, G, N); group g serves the channels g * D / G ... (g + 1) * D / G - 1.
    state:       (slots, D, N), float32 unless configured otherwise; slots named are updated in place.
    seq_offsets: (S + 1,) int32; slots: (S,) int32, all different. Empty sequences keep their state.
    Returns y (T, D) in x's dtype; everything between is float32 (float64 for float64 inputs).
    """
    return backend.implementation("selective_scan")(
        x, dt, A_log, B, C, D, z, dt_bias, state, seq_offsets, slots
    )


def selective_state_update(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    state: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    """`selective_scan` for exactly one token a sequence: x, dt, z (S, D), B, C (S, G, N), slots (S,)."""
    return backend.implementation("selective_state_update")(x, dt, A_log, B, C, D, z, dt_bias, state, slots)


def projected_state_update(
    x: Tensor, given: Tensor, weight: Tensor, A_log: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    state: Tensor, slots: Tensor, rms_eps: float | None = None,
) -> Tensor:  # fmt: skip
    """`selective_state_update` from what x_proj gives: dt before its projection, B and C, side by side.

    given:  (S, G, R + 2 N); with `rms_eps`, each of the three first goes through `rms_normalize`.
    weight: (D, R), dt_proj's; see `linear_by_head`. The rest as in `selective_state_update`.
    """
    return backend.implementation("projected_state_update")(
        x, given, weight, A_log, D, z, dt_bias, state, slots, rms_eps
    )


@backend.register("selective_scan", "reference")
def selective_scan_reference(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    state: Tensor, seq_offsets: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    """The definition of `selective_scan` in plain torch.

    Blocks of tokens are combined by an inclusive scan in log2(TIME_BLOCK) doublings that never cross the
    start of a sequence; a block hands its last state to the next one.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    sequence = sequence_of_token(seq_offsets, x.shape[0])
    place = place_in_sequence(seq_offsets, sequence)
    final = state[slots.long()].to(wide)
    initial, carry = final, torch.zeros_like(state[0], dtype=wide)
    A, blocks = -torch.exp(A_log.to(wide)), []
    for start in range(0, x.shape[0], TIME_BLOCK):
        t = slice(start, start + TIME_BLOCK)
        step = F.softplus(dt[t].to(wide) + dt_bias.to(wide))
        decay, total = torch.exp(step[..., None] * A), _outer(step * x[t].to(wide), B[t].to(wide))
        decay, total = _combine(decay, total, place[t])
        fresh = place[t] <= torch.arange(place[t].shape[0], device=x.device)
        entry = torch.where(fresh[:, None, None], initial[sequence[t]], carry)
        states = total + decay * entry
        carry, final = states[-1], _ends_within(final, states, seq_offsets, start)
        blocks.append(_read_out(states, x[t], C[t], D, z[t], wide))
    state[slots.long()] = final.to(state.dtype)
    return torch.cat(blocks).to(x.dtype) if blocks else torch.empty_like(x)


def _outer(u: Tensor, B: Tensor) -> Tensor:
    """u (T, D) times B (T, G, N), each group of channels with its own B: (T, D, N)."""
    grouped = u.unflatten(1, (B.shape[1], -1))
    return (grouped[..., None] * B[:, :, None]).flatten(1, 2)


def _combine(decay: Tensor, total: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Inclusive scan of s -> decay * s + total along the first axis, within each sequence."""
    shift = 1
    while shift < decay.shape[0]:
        joined = (place >= shift)[shift:, None, None]
        later, earlier = decay[shift:], decay[:-shift]
        tail = torch.where(joined, total[shift:] + later * total[:-shift], total[shift:])
        decay = torch.cat([decay[:shift], torch.where(joined, later * earlier, later)])
        total = torch.cat([total[:shift], tail])
        shift *= 2
    return decay, total


def _ends_within(final: Tensor, states: Tensor, seq_offsets: Tensor, start: int) -> Tensor:
    """`final` (S, D, N) with the states of those sequences whose last token lies in this block."""
    last = seq_offsets[1:].long() - 1 - start
    ends = (last >= 0) & (last < states.shape[0]) & (seq_offsets[1:] > seq_offsets[:-1])
    return torch.where(ends[:, None, None], states[last.clamp(0, states.shape[0] - 1)], final)


def _read_out(states: Tensor, x: Tensor, C: Tensor, D: Tensor, z: Tensor, wide: torch.dtype) -> Tensor:
    """(C . s + D x) silu(z) for states (T, D, N), in the wide dtype."""
    grouped = states.unflatten(1, (C.shape[1], -1))
    y = (grouped * C.to(wide)[:, :, None]).sum(-1).flatten(1)
    return (y + D.to(wide) * x.to(wide)) * F.silu(z.to(wide))


@backend.register("selective_state_update", "reference")
def selective_state_update_reference(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    state: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    """The definition of `selective_state_update` in plain torch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    step = F.softplus(dt.to(wide) + dt_bias.to(wide))
    decay = torch.exp(step[..., None] * -torch.exp(A_log.to(wide)))
    states = decay * state[slots.long()].to(wide) + _outer(step * x.to(wide), B.to(wide))
    state[slots.long()] = states.to(state.dtype)
    return _read_out(states, x, C, D, z, wide).to(x.dtype)


@backend.register("projected_state_update", "reference")
def projected_state_update_reference(
    x: Tensor, given: Tensor, weight: Tensor, A_log: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    state: Tensor, slots: Tensor, rms_eps: float | None,
) -> Tensor:  # fmt: skip
    """The definition of `projected_state_update`: the ops that it consists of, in the selected backend."""
    dt, B, C = given.split([weight.shape[1], A_log.shape[1], A_log.shape[1]], dim=-1)
    if rms_eps is not None:
        dt, B, C = (rms_normalize(t, rms_eps) for t in (dt, B, C))
    return selective_state_update(x, linear_by_head(dt, weight), A_log, B, C, D, z, dt_bias, state, slots)
