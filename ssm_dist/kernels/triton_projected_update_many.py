"""Triton kernel of dt_proj and the state update together, for many sequences: the tensor cores project.

All states that a program updates are under way before it multiplies: memory bounds it, as the update alone.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.kernels.dependent_launch import launch_options, start_next, wait_for_inputs
from ssm_dist.kernels.triton_common import LOG2_E, exp2, factor, silu, softplus

WARP_D = tl.constexpr(8)
"""Channels whose 16 float32 states a warp takes at once. Its other channels take turns, so that warps divide
the sequences, and a thread holds B and C of few."""


@triton.jit
def _by_warp(v):
    """(sequences, channels) -> (channels / WARP_D, sequences, WARP_D)."""
    return tl.permute(tl.reshape(v, (v.shape[0], v.shape[1] // WARP_D, WARP_D)), (1, 0, 2))


@triton.jit
def _over_rms(v, width, eps):
    """What the rows of v, some of `width` and zeros, have to be multiplied by."""
    v = v.to(tl.float32)
    return tl.rsqrt(tl.sum(v * v, 1) / width + eps)[:, None]


@triton.jit
def _projected(low, factors, eps, RANK: tl.constexpr, RMS: tl.constexpr):
    """Rows of RANK numbers and zeros, times factors, as float32; with RMS, normalised rows."""
    total = tl.dot(factor(low), factor(factors))
    if RMS:
        total *= _over_rms(low, RANK, eps)
    return total


@triton.jit
def _of_states(v, eps, RMS: tl.constexpr):
    """B or C of sequences beside their states: (1, sequences, 1, N), as float32; with RMS, normalised."""
    wide = v.to(tl.float32)
    if RMS:
        wide *= _over_rms(v, v.shape[1], eps)
    return wide[None, :, None, :]


@triton.jit(do_not_specialize=["sequences"])
def _projected_updates_kernel(
    x, given, weight, A_log, D, z, dt_bias, state, slots, y,
    x_row, z_row, given_row, given_group, state_slot, sequences, channels, group_channels, eps,
    RANK: tl.constexpr, N: tl.constexpr, RMS: tl.constexpr, PDL: tl.constexpr,
    BLOCK_R: tl.constexpr, SEQUENCES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: one token of SEQUENCES sequences, BLOCK_D channels of a group."""
    start_next(PDL)
    blocks = tl.cdiv(channels, BLOCK_D)
    corner = (tl.program_id(0) % blocks) * BLOCK_D
    channel = corner + tl.arange(0, BLOCK_D)[None, :]
    held = channel < channels
    n, r = tl.arange(0, N), tl.arange(0, BLOCK_R)
    row = corner + tl.arange(0, BLOCK_D // WARP_D)[:, None, None, None] * WARP_D
    row += tl.arange(0, WARP_D)[None, None, :, None]
    cell = row * N + n[None, None, None, :]
    factors = tl.load(weight + channel * RANK + r[:, None], mask=held & (r < RANK)[:, None], other=0.0)
    A = tl.load(A_log + cell, mask=row < channels, other=0.0).to(tl.float32)
    skip = tl.load(D + channel, mask=held, other=0.0).to(tl.float32)
    bias = tl.load(dt_bias + channel, mask=held, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)

    # Loads are issued in order: what needs a slot comes after all that does not, and before any arithmetic.
    sequence = (tl.program_id(0) // blocks) * SEQUENCES + tl.arange(0, SEQUENCES)
    real = sequence < sequences
    slot = tl.load(slots + sequence, mask=real, other=0).to(tl.int64)
    sequence = tl.minimum(sequence, sequences - 1).to(tl.int64)[:, None]
    here = real[:, None] & held
    group = given + sequence * given_row + (corner // group_channels) * given_group
    low = tl.load(group + r[None, :], mask=(r < RANK)[None, :], other=0.0)
    B = tl.load(group + RANK + n[None, :])
    C = tl.load(group + RANK + N + n[None, :])
    u = tl.load(x + sequence * x_row + channel, mask=here, other=0.0)
    gate = tl.load(z + sequence * z_row + channel, mask=here, other=0.0)
    cells = state + (slot * state_slot)[None, :, None, None] + cell
    mine = real[None, :, None, None] & (row < channels)
    before = tl.load(cells, mask=mine, other=0.0)

    u = u.to(tl.float32)
    step = softplus(_projected(low, factors, eps, RANK, RMS) + bias)
    decay = exp2(_by_warp(step)[:, :, :, None] * (-tl.exp(A) * LOG2_E))
    # B and C fill many registers from where they are first needed on.
    new = decay * before.to(tl.float32) + _by_warp(step * u)[:, :, :, None] * _of_states(B, eps, RMS)
    tl.store(cells, new.to(state.dtype.element_ty), mask=mine)
    read = tl.permute(tl.sum(new * _of_states(C, eps, RMS), 3), (1, 0, 2))
    total = (tl.reshape(read, (SEQUENCES, BLOCK_D)) + skip * u) * silu(gate.to(tl.float32))
    tl.store(y + sequence * channels + channel, total.to(y.dtype.element_ty), mask=here)


def serves(x: Tensor, given: Tensor, weight: Tensor) -> bool:
    """Whether the tensor cores multiply such numbers: of two bytes, and of one type."""
    return x.element_size() == 2 and x.dtype == given.dtype == weight.dtype


def launch(
    x: Tensor, given: Tensor, weight: Tensor, A_log: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    state: Tensor, slots: Tensor, rms_eps: float | None, config: dict[str, Any],
) -> Tensor:  # fmt: skip
    """`ssm_dist.kernels.projected_state_update`, in blocks of SEQUENCES and BLOCK_D of `config`."""
    (sequences, channels), (_, groups, _), rank = x.shape, given.shape, weight.shape[1]
    y, block = x.new_empty(x.shape), max(16, triton.next_power_of_2(rank))
    programs = triton.cdiv(sequences, config["SEQUENCES"]) * triton.cdiv(channels, config["BLOCK_D"])
    with torch.cuda.device_of(x):
        _projected_updates_kernel[(programs,)](
            x, given, weight, A_log, D, z, dt_bias, state, slots, y,
            x.stride(0), z.stride(0), given.stride(0), given.stride(1), state.stride(0), sequences, channels,
            channels // groups, rms_eps or 0.0,
            RANK=rank, N=A_log.shape[1], RMS=rms_eps is not None, BLOCK_R=block,
            enable_fp_fusion=True, **config, **launch_options(x.device),
        )  # fmt: skip
    return y
