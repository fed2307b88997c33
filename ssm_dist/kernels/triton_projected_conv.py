"""Triton kernel of the convolution's update and x_proj together, for few sequences: one launch, not two.

Each program computes a block of channels and what they contribute to x_proj's outputs; see `triton_shares`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.kernels import backend, tuning
from ssm_dist.kernels.convolution import projected_conv_update_reference
from ssm_dist.kernels.dependent_launch import launch_options, start_next, wait_for_inputs
from ssm_dist.kernels.operators import operator
from ssm_dist.kernels.triton_common import silu
from ssm_dist.kernels.triton_shares import COUNTERS, counters, last_to_finish

MOST_SEQUENCES = 4
HELD = 256
"""Numbers of x_proj's weight in a thread's registers at most."""


@triton.jit
def _taps_by_lag(taps, channel, channels, WIDTH: tl.constexpr):
    """The weights of the inputs 0 to 3 tokens back; zeros beyond the width.

    One by one, although strided: a tile of them would impose its layout on x_proj's product, by shuffles.
    """
    by_lag = ()
    for lag in tl.static_range(4):
        here = channel < (channels if lag < WIDTH else 0)
        by_lag += (tl.load(taps + channel * WIDTH + (WIDTH - 1 - lag), mask=here, other=0.0).to(tl.float32),)
    return by_lag


@triton.jit
def _projected_conv_kernel(
    x, taps, bias, state, slots, weight, y, projected, parts, counters,
    x_row, state_slot, state_row, channels, group_channels,
    WIDTH: tl.constexpr, OUTPUTS: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: one token of a sequence, BLOCK_D channels, all of one group."""
    KEPT: tl.constexpr = WIDTH - 1
    start_next(PDL)
    blocks = tl.cdiv(channels, BLOCK_D)
    block, sequence = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    channel = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channel < channels
    r = tl.arange(0, BLOCK_R)
    factors = tl.load(
        weight + channel[:, None] * OUTPUTS + r[None, :],
        mask=inside[:, None] & (r < OUTPUTS)[None, :], other=0.0,
    )  # fmt: skip
    tap0, tap1, tap2, tap3 = _taps_by_lag(taps, channel, channels, WIDTH)
    total = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)

    at = x + sequence.to(tl.int64) * x_row + channel
    current = tl.load(at, mask=inside, other=0.0)
    base = state + tl.load(slots + sequence).to(tl.int64) * state_slot + channel
    lag1 = tl.load(base + (KEPT - 1) * state_row, mask=inside, other=0.0)
    lag2 = tl.zeros_like(lag1)
    lag3 = tl.zeros_like(lag1)
    if WIDTH > 2:
        lag2 = tl.load(base + (KEPT - 2) * state_row, mask=inside, other=0.0)
    if WIDTH > 3:
        lag3 = tl.load(base, mask=inside, other=0.0)
    tl.debug_barrier()
    tl.store(base + (KEPT - 1) * state_row, current.to(state.dtype.element_ty), mask=inside)
    if WIDTH > 2:
        tl.store(base + (KEPT - 2) * state_row, lag1, mask=inside)
    if WIDTH > 3:
        tl.store(base, lag2, mask=inside)
    total += tap0 * current.to(tl.float32) + tap1 * lag1.to(tl.float32)
    total += tap2 * lag2.to(tl.float32) + tap3 * lag3.to(tl.float32)
    value = silu(total).to(y.dtype.element_ty)
    tl.store(y + sequence.to(tl.int64) * channels + channel, value, mask=inside)

    part = tl.sum(factors.to(tl.float32) * tl.where(inside, value, 0.0).to(tl.float32)[:, None], 0)
    tl.store(parts + tl.program_id(0) * OUTPUTS + r, part, mask=r < OUTPUTS)
    group, sharing = (block * BLOCK_D) // group_channels, tl.cdiv(group_channels, BLOCK_D)
    which = sequence * (channels // group_channels) + group
    if last_to_finish(counters + which, sharing):
        p = tl.arange(0, BLOCK_P)
        first = sequence * blocks + group * sharing
        whole = tl.zeros((BLOCK_R,), tl.float32)
        for other in range(0, sharing, BLOCK_P):
            whole += tl.sum(
                tl.load(
                    parts + (first + other + p)[:, None] * OUTPUTS + r[None, :],
                    mask=(other + p < sharing)[:, None] & (r < OUTPUTS)[None, :],
                    other=0.0, cache_modifier=".cg",
                ), 0,
            )  # fmt: skip
        tl.store(projected + which * OUTPUTS + r, whole.to(projected.dtype.element_ty), mask=r < OUTPUTS)


def _outputs(
    x: Tensor, taps: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor, weight: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], groups, weight.shape[1]))


@operator("projected_conv_update", mutates=("state",), fake=_outputs)
def _few_sequences(
    x: Tensor, taps: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor, weight: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    (sequences, channels), outputs = x.shape, weight.shape[1]
    y, projected = _outputs(x, taps, bias, state, slots, weight, groups)
    config = tuning.configuration("projected_conv_update", channels, x.device)
    programs = sequences * triton.cdiv(channels, config["BLOCK_D"])
    parts = x.new_empty((programs, outputs), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _projected_conv_kernel[(programs,)](
            x, taps, bias, state, slots, weight, y, projected, parts, counters(x.device),
            x.stride(0), state.stride(0), state.stride(1), channels, channels // groups,
            WIDTH=taps.shape[1], OUTPUTS=outputs, HAS_BIAS=bias is not None,
            BLOCK_R=triton.next_power_of_2(outputs), enable_fp_fusion=True,
            **config, **launch_options(x.device),
        )  # fmt: skip
    return y, projected


@backend.register("projected_conv_update", "triton")
def projected_conv_update(
    x: Tensor, taps: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor, weight: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """`ssm_dist.kernels.projected_conv_update`; for many sequences, or odd sizes, by separate kernels."""
    sequences, channels = x.shape
    config = tuning.configuration("projected_conv_update", channels, x.device)
    block = config["BLOCK_D"]
    fits = 2 <= taps.shape[1] <= 4 and (groups == 1 or channels // groups % block == 0)
    fits &= block * triton.next_power_of_2(weight.shape[1]) <= HELD * 32 * config["num_warps"]
    if not (fits and 0 < sequences <= MOST_SEQUENCES and sequences * groups <= COUNTERS):
        return projected_conv_update_reference(x, taps, bias, state, slots, weight, groups)
    assert x.stride(-1) == 1 and state.stride(-1) == 1 and taps.is_contiguous() and weight.is_contiguous()
    return _few_sequences(x, taps, bias, state, slots, weight, groups)
