"""Triton kernels of the causal convolution, ragged and one-token update. Both are bound by memory."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.kernels import backend, tuning
from ssm_dist.kernels.dependent_launch import launch_options, start_next, wait_for_inputs
from ssm_dist.kernels.operators import operator
from ssm_dist.kernels.triton_common import chunk_of_program, only_if, silu


@triton.jit
def _taps_and_bias(weight, bias, channel, inside, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The (channels, 4) tile of weights, read whole since its columns are strided, and the bias; float32."""
    k = tl.arange(0, 4)
    taps = tl.load(
        weight + channel[:, None] * WIDTH + k[None, :], mask=inside[:, None] & (k < WIDTH)[None, :], other=0.0
    )
    offset = tl.zeros_like(channel).to(tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    return taps.to(tl.float32), offset


@triton.jit
def _taps_by_lag(taps, WIDTH: tl.constexpr):
    """The weights of the inputs 0 to 3 tokens back, from the tile of them; zeros beyond the width."""
    k = tl.arange(0, 4)[None, :]
    bits = taps.to(tl.int32, bitcast=True)  # of which adding zeros costs nothing
    by_lag = ()
    for lag in tl.static_range(4):
        by_lag += (tl.sum(tl.where(k == WIDTH - 1 - lag, bits, 0), 1).to(tl.float32, bitcast=True),)
    return by_lag


@triton.jit
def _three_before(end, row, inside, WIDTH: tl.constexpr):
    """The rows of inputs 1, 2 and 3 before `end`, float32; zeros beyond the width."""
    lag1 = tl.load(end - row, mask=inside, other=0.0).to(tl.float32)
    lag2 = tl.zeros_like(lag1)
    lag3 = tl.zeros_like(lag1)
    if WIDTH > 2:
        lag2 = tl.load(end - 2 * row, mask=inside, other=0.0).to(tl.float32)
    if WIDTH > 3:
        lag3 = tl.load(end - 3 * row, mask=inside, other=0.0).to(tl.float32)
    return lag1, lag2, lag3


@triton.jit
def _input_at(x, state, place, start, x_row, state_row, channel, channels, KEPT: tl.constexpr):
    """The input at `place` of a sequence that starts at token `start`; below 0 it is one of its state's."""
    new = tl.load(
        x + (start + place).to(tl.int64) * x_row + channel,
        mask=channel < only_if(place >= 0, channels), other=0.0,
    )  # fmt: skip
    old = tl.load(
        state + (place + KEPT) * state_row + channel, mask=channel < only_if(place < 0, channels), other=0.0
    )
    return tl.where(place >= 0, new.to(tl.float32), old.to(tl.float32))


@triton.jit
def _conv_kernel(
    x, weight, bias, state, seq_offsets, slots, y,
    x_row, state_slot, state_row, sequences, channels,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens of a sequence, BLOCK_D channels; the window of inputs in registers.

    TILE rows are on their way at any time: each row used asks for the one TILE later.
    """
    KEPT: tl.constexpr = WIDTH - 1
    start_next(PDL)
    blocks = tl.cdiv(channels, BLOCK_D)
    program = tl.program_id(0)
    channel = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channel < channels
    # Asked for first and used last: loads are issued in order, and each wait ahead of them would be added.
    taps, offset = _taps_and_bias(weight, bias, channel, inside, WIDTH, HAS_BIAS)
    wait_for_inputs(PDL)
    sequence, start, end, first = chunk_of_program(
        seq_offsets, sequences, program // blocks, BLOCK_T, BLOCK_S
    )
    if first >= end:
        return
    count = tl.where(inside, end - first, 0)
    # Pointers move on by a row: offsets of all rows at once would take more registers than the rows.
    from_x = x + first.to(tl.int64) * x_row + channel
    to_y = y + first.to(tl.int64) * channels + channel
    lag1, lag2, lag3 = _three_before(from_x, x_row, channel < only_if(first > start, channels), WIDTH)
    rows = ()
    for i in tl.static_range(TILE):
        rows += (tl.load(from_x, mask=i < count),)
        from_x += x_row
    tap0, tap1, tap2, tap3 = _taps_by_lag(taps, WIDTH)

    if first == start:
        # The only program of the sequence that reads the state is also the one that replaces it.
        state += tl.load(slots + sequence).to(tl.int64) * state_slot
        lag1, lag2, lag3 = _three_before(state + KEPT * state_row + channel, state_row, inside, WIDTH)
        kept = ()
        for k in tl.static_range(KEPT):
            place = end - start - KEPT + k
            new = _input_at(x, state, place, start, x_row, state_row, channel, channels, KEPT)
            kept += (new.to(state.dtype.element_ty),)
        tl.debug_barrier()
        for k in tl.static_range(KEPT):
            tl.store(state + k * state_row + channel, kept[k], mask=inside)

    for i in tl.static_range(BLOCK_T):
        # Short sequences stop early; and without these stops, rows that run into each other take registers.
        if i > 0 and i % 4 == 0 and first + i >= end:
            return
        current = rows[i].to(tl.float32)
        if i + TILE < BLOCK_T:
            # Before this row's store, which no later load could overtake.
            rows += (tl.load(from_x, mask=i + TILE < count),)
            from_x += x_row
        total = offset + tap0 * current + tap1 * lag1 + tap2 * lag2 + tap3 * lag3
        tl.store(to_y, silu(total).to(y.dtype.element_ty), mask=i < count)
        to_y += channels
        lag3 = lag2
        lag2 = lag1
        lag1 = current


@triton.jit
def _conv_update_kernel(
    x, weight, bias, state, slots, y,
    x_row, state_slot, state_row, sequences, channels,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, SEQUENCES: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: one token of SEQUENCES sequences, BLOCK_D channels, whose weights are read once."""
    KEPT: tl.constexpr = WIDTH - 1
    start_next(PDL)
    blocks = tl.cdiv(channels, BLOCK_D)
    program = tl.program_id(0)
    channel = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channel < channels
    first = (program // blocks) * SEQUENCES
    taps, offset = _taps_and_bias(weight, bias, channel, inside, WIDTH, HAS_BIAS)
    wait_for_inputs(PDL)

    # Every load comes before the first store: they overlap, and a shifted row is read before it is written.
    # What needs a slot comes last, since loads are issued in order and would wait for it.
    slot_of = ()
    for i in tl.static_range(SEQUENCES):
        slot_of += (tl.load(slots + first + i, mask=first + i < sequences, other=0),)
    inputs = ()
    for i in tl.static_range(SEQUENCES):
        here = channel < only_if(first + i < sequences, channels)
        inputs += (tl.load(x + (first + i).to(tl.int64) * x_row + channel, mask=here, other=0.0),)
    windows = ()
    for i in tl.static_range(SEQUENCES):
        here = channel < only_if(first + i < sequences, channels)
        base = state + slot_of[i].to(tl.int64) * state_slot + channel
        lag1 = tl.load(base + (KEPT - 1) * state_row, mask=here, other=0.0)
        lag2 = tl.zeros_like(lag1)
        lag3 = tl.zeros_like(lag1)
        if WIDTH > 2:
            lag2 = tl.load(base + (KEPT - 2) * state_row, mask=here, other=0.0)
        if WIDTH > 3:
            lag3 = tl.load(base, mask=here, other=0.0)
        windows += ((lag1, lag2, lag3),)
    tap0, tap1, tap2, tap3 = _taps_by_lag(taps, WIDTH)
    tl.debug_barrier()
    for i in tl.static_range(SEQUENCES):
        here = channel < only_if(first + i < sequences, channels)
        base = state + slot_of[i].to(tl.int64) * state_slot + channel
        current = inputs[i]
        lag1, lag2, lag3 = windows[i]
        tl.store(base + (KEPT - 1) * state_row, current.to(state.dtype.element_ty), mask=here)
        if WIDTH > 2:
            tl.store(base + (KEPT - 2) * state_row, lag1, mask=here)
        if WIDTH > 3:
            tl.store(base, lag2, mask=here)
        total = offset + tap0 * current.to(tl.float32) + tap1 * lag1.to(tl.float32)
        total += tap2 * lag2.to(tl.float32) + tap3 * lag3.to(tl.float32)
        at = y + (first + i).to(tl.int64) * channels + channel
        tl.store(at, silu(total).to(y.dtype.element_ty), mask=here)


@backend.register("causal_conv", "triton")
@operator("causal_conv", mutates=("state",))
def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, seq_offsets: Tensor, slots: Tensor
) -> Tensor:
    """`ssm_dist.kernels.causal_conv`; the channels of x and of the state must be contiguous."""
    (tokens, channels), width = x.shape, weight.shape[1]
    _check(x, weight, state)
    y = x.new_empty(x.shape)
    size = x.numel() if slots.shape[0] == 1 else math.inf
    config = tuning.configuration("causal_conv", size, x.device)
    chunks = tokens // config["BLOCK_T"] + slots.shape[0]
    if tokens:
        with torch.cuda.device_of(x):
            _conv_kernel[(chunks * triton.cdiv(channels, config["BLOCK_D"]),)](
                x, weight, bias, state, seq_offsets, slots, y,
                x.stride(0), state.stride(0), state.stride(1), slots.shape[0], channels,
                WIDTH=width, HAS_BIAS=bias is not None,
                BLOCK_S=min(triton.next_power_of_2(slots.shape[0]), 256),
                enable_fp_fusion=True, **config, **launch_options(x.device),
            )  # fmt: skip
    return y


@backend.register("causal_conv_update", "triton")
@operator("causal_conv_update", mutates=("state",))
def causal_conv_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor
) -> Tensor:
    """`ssm_dist.kernels.causal_conv_update`; the channels of x and of the state must be contiguous."""
    (sequences, channels), width = x.shape, weight.shape[1]
    _check(x, weight, state)
    y = x.new_empty(x.shape)
    config = tuning.configuration("causal_conv_update", sequences * channels, x.device)
    programs = triton.cdiv(sequences, config["SEQUENCES"]) * triton.cdiv(channels, config["BLOCK_D"])
    if sequences:
        with torch.cuda.device_of(x):
            _conv_update_kernel[(programs,)](
                x, weight, bias, state, slots, y,
                x.stride(0), state.stride(0), state.stride(1), sequences, channels,
                WIDTH=width, HAS_BIAS=bias is not None, enable_fp_fusion=True, **config,
                **launch_options(x.device),
            )  # fmt: skip
    return y


def _check(x: Tensor, weight: Tensor, state: Tensor) -> None:
    assert 2 <= weight.shape[1] <= 4, f"the Triton convolution serves widths 2 to 4, not {weight.shape[1]}"
    assert x.stride(-1) == 1 and state.stride(-1) == 1 and weight.is_contiguous()
