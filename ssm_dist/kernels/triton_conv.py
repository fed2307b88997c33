"""Triton kernels of the causal convolution, ragged and one-token update. Both are bound by memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.kernels import backend, tuning
from ssm_dist.kernels.triton_common import chunk_of_program, only_if, silu


@triton.jit
def _tap(taps, WIDTH: tl.constexpr, LAG: tl.constexpr):
    """The weights of the input LAG tokens back, from the (channels, 4) tile of them; 0 beyond the width."""
    column = tl.arange(0, 4)[None, :] == WIDTH - 1 - LAG
    return tl.sum(tl.where(column, taps, 0.0), 1)


@triton.jit
def _taps_and_bias(weight, bias, channel, inside, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Weights by lag 0-3 and the bias, float32; read as one tile, since single columns are strided."""
    k = tl.arange(0, 4)
    taps = tl.load(
        weight + channel[:, None] * WIDTH + k[None, :], mask=inside[:, None] & (k < WIDTH)[None, :], other=0.0
    ).to(tl.float32)
    offset = tl.zeros_like(channel).to(tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    return _tap(taps, WIDTH, 0), _tap(taps, WIDTH, 1), _tap(taps, WIDTH, 2), _tap(taps, WIDTH, 3), offset


@triton.jit
def _input_before(x, state, place, start, x_row, state_row, channel, channels, KEPT: tl.constexpr):
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
    BLOCK_T: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens of a sequence, BLOCK_D channels; the window of inputs in registers."""
    KEPT: tl.constexpr = WIDTH - 1
    blocks = tl.cdiv(channels, BLOCK_D)
    program = tl.program_id(0)
    sequence, start, end, first = chunk_of_program(
        seq_offsets, sequences, program // blocks, BLOCK_T, BLOCK_S
    )
    if first >= end:
        return
    channel = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channel < channels
    tap0, tap1, tap2, tap3, offset = _taps_and_bias(weight, bias, channel, inside, WIDTH, HAS_BIAS)
    state += tl.load(slots + sequence).to(tl.int64) * state_slot

    place = first - start
    lag1 = _input_before(x, state, place - 1, start, x_row, state_row, channel, channels, KEPT)
    lag2 = tl.zeros_like(lag1)
    lag3 = tl.zeros_like(lag1)
    if WIDTH > 2:
        lag2 = _input_before(x, state, place - 2, start, x_row, state_row, channel, channels, KEPT)
    if WIDTH > 3:
        lag3 = _input_before(x, state, place - 3, start, x_row, state_row, channel, channels, KEPT)
    if place == 0:
        # The only program of the sequence that reads the state is also the one that replaces it.
        kept = ()
        for k in tl.static_range(KEPT):
            last = end - start - KEPT + k
            kept += (_input_before(x, state, last, start, x_row, state_row, channel, channels, KEPT),)
        tl.debug_barrier()
        for k in tl.static_range(KEPT):
            tl.store(state + k * state_row + channel, kept[k].to(state.dtype.element_ty), mask=inside)

    for t in range(0, tl.minimum(BLOCK_T, end - first), TILE):
        # All loads of a tile come before its first store, which no later load could overtake.
        rows = ()
        for i in tl.static_range(TILE):
            token = (first + t + i).to(tl.int64)
            here = channel < only_if(token < end, channels)
            rows += (tl.load(x + token * x_row + channel, mask=here, other=0.0),)
        for i in tl.static_range(TILE):
            token = (first + t + i).to(tl.int64)
            current = rows[i].to(tl.float32)
            total = offset + tap0 * current + tap1 * lag1 + tap2 * lag2 + tap3 * lag3
            here = channel < only_if(token < end, channels)
            tl.store(y + token * channels + channel, silu(total).to(y.dtype.element_ty), mask=here)
            lag3 = lag2
            lag2 = lag1
            lag1 = current


@triton.jit
def _conv_update_kernel(
    x, weight, bias, state, slots, y,
    x_row, state_slot, state_row, sequences, channels,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, SEQUENCES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: one token of SEQUENCES sequences, BLOCK_D channels, whose weights are read once."""
    KEPT: tl.constexpr = WIDTH - 1
    blocks = tl.cdiv(channels, BLOCK_D)
    program = tl.program_id(0)
    channel = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channel < channels
    tap0, tap1, tap2, tap3, offset = _taps_and_bias(weight, bias, channel, inside, WIDTH, HAS_BIAS)
    first = (program // blocks) * SEQUENCES

    # Every load comes before the first store: they overlap, and a shifted row is read before it is written.
    states, windows = (), ()
    for i in tl.static_range(SEQUENCES):
        s = (first + i).to(tl.int64)
        here = channel < only_if(s < sequences, channels)
        base = state + tl.load(slots + s, mask=s < sequences, other=0).to(tl.int64) * state_slot + channel
        current = tl.load(x + s * x_row + channel, mask=here, other=0.0)
        lag1 = tl.load(base + (KEPT - 1) * state_row, mask=here, other=0.0)
        lag2 = tl.zeros_like(lag1)
        lag3 = tl.zeros_like(lag1)
        if WIDTH > 2:
            lag2 = tl.load(base + (KEPT - 2) * state_row, mask=here, other=0.0)
        if WIDTH > 3:
            lag3 = tl.load(base, mask=here, other=0.0)
        states += (base,)
        windows += ((current, lag1, lag2, lag3),)
    tl.debug_barrier()
    for i in tl.static_range(SEQUENCES):
        s = (first + i).to(tl.int64)
        here = channel < only_if(s < sequences, channels)
        current, lag1, lag2, lag3 = windows[i]
        tl.store(states[i] + (KEPT - 1) * state_row, current.to(state.dtype.element_ty), mask=here)
        if WIDTH > 2:
            tl.store(states[i] + (KEPT - 2) * state_row, lag1, mask=here)
        if WIDTH > 3:
            tl.store(states[i], lag2, mask=here)
        total = offset + tap0 * current.to(tl.float32) + tap1 * lag1.to(tl.float32)
        total += tap2 * lag2.to(tl.float32) + tap3 * lag3.to(tl.float32)
        tl.store(y + s * channels + channel, silu(total).to(y.dtype.element_ty), mask=here)


@backend.register("causal_conv", "triton")
@torch.library.custom_op("ssm_dist::causal_conv", mutates_args=("state",))
def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, seq_offsets: Tensor, slots: Tensor
) -> Tensor:
    """`ssm_dist.kernels.causal_conv`; the channels of x and of the state must be contiguous."""
    (tokens, channels), width = x.shape, weight.shape[1]
    _check(x, weight, state)
    y = x.new_empty(x.shape)
    config = tuning.configuration("causal_conv", tokens * channels, x.device)
    chunks = tokens // config["BLOCK_T"] + slots.shape[0]
    if tokens:
        with torch.cuda.device_of(x):
            _conv_kernel[(chunks * triton.cdiv(channels, config["BLOCK_D"]),)](
                x, weight, bias, state, seq_offsets, slots, y,
                x.stride(0), state.stride(0), state.stride(1), slots.shape[0], channels,
                WIDTH=width, HAS_BIAS=bias is not None,
                BLOCK_S=min(triton.next_power_of_2(slots.shape[0]), 256),
                enable_fp_fusion=True, **config,
            )  # fmt: skip
    return y


@backend.register("causal_conv_update", "triton")
@torch.library.custom_op("ssm_dist::causal_conv_update", mutates_args=("state",))
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
            )  # fmt: skip
    return y


def _check(x: Tensor, weight: Tensor, state: Tensor) -> None:
    assert 2 <= weight.shape[1] <= 4, f"the Triton convolution serves widths 2 to 4, not {weight.shape[1]}"
    assert x.stride(-1) == 1 and state.stride(-1) == 1 and weight.is_contiguous()


@causal_conv.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, seq_offsets: Tensor, slots: Tensor
) -> Tensor:
    return x.new_empty(x.shape)


@causal_conv_update.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor) -> Tensor:
    return x.new_empty(x.shape)
