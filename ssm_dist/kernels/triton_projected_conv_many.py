"""Triton kernel of the convolution's update and x_proj together, for many sequences, on the tensor cores.

Each program takes a block of sequences and a share of the channels. What the channels contribute to x_proj's
outputs the last of the shares adds up (see `triton_shares`): few sequences a program leave it little to read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.kernels import tuning
from ssm_dist.kernels.dependent_launch import launch_options, start_next, wait_for_inputs
from ssm_dist.kernels.operators import operator
from ssm_dist.kernels.triton_common import factor, silu
from ssm_dist.kernels.triton_shares import COUNTERS, counters, last_to_finish

LEAST = tl.constexpr(16)
"""Columns of the tensor cores' product at least: fewer sequences are padded."""
HELD = 320
"""Bytes of x and states in a thread's registers at most; half of them with 16 warps."""
ROOM = 200 * 1024
"""Bytes of x_proj's weight in shared memory at most."""


@triton.constexpr_function
def _tiles(outputs, block):
    """Tiles of x_proj's outputs."""
    return -(-outputs // block)


@triton.constexpr_function
def _size(k, outputs, block):
    """Outputs of tile k: a block, or half of one where that has the last of them, but a warp group's 64."""
    return max(64, block // 2) if 2 * (outputs - k * block) <= block else block


@triton.jit
def _weights(weight, channel, channels, OUTPUTS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Columns of x_proj's weight, which is stored by its outputs, in tiles of these; zeros past OUTPUTS."""
    tiles = ()
    for k in tl.static_range(_tiles(OUTPUTS, BLOCK_R)):
        r = k * BLOCK_R + tl.arange(0, _size(k, OUTPUTS, BLOCK_R))[:, None]
        tiles += (tl.load(weight + r * channels + channel[None, :], mask=r < OUTPUTS, other=0.0),)
    return tiles


@triton.jit
def _taps(taps, bias, channel, at, real, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Weights of the inputs 0, 1, ... tokens back, and the bias, of channels `at` past these."""
    found = ()
    if WIDTH == 4:
        # Whole rows in one load and two registers.
        row = tl.load(taps.to(tl.pointer_type(tl.int64)) + channel + at, mask=real, other=0)
        for lag in tl.static_range(4):
            found += ((row >> (16 * (3 - lag))).to(tl.int16).to(taps.dtype.element_ty, bitcast=True),)
    else:
        for lag in tl.static_range(WIDTH):
            found += (tl.load(taps + channel * WIDTH + (at * WIDTH + WIDTH - 1 - lag), mask=real, other=0.0),)
    if HAS_BIAS:
        found += (tl.load(bias + channel + at, mask=real, other=0.0),)
    return found


@triton.jit
def _window(x, state, at, real, state_row, WIDTH: tl.constexpr):
    """The inputs 0, 1, ... tokens back, `at` channels past pointers into x and the oldest rows of states."""
    inputs = (tl.load(x + at, mask=real, other=0.0),)
    for lag in tl.static_range(1, WIDTH):
        inputs += (tl.load(state + (WIDTH - 1 - lag) * state_row + at, mask=real, other=0.0),)
    return inputs


@triton.jit
def _convolved(window, taps, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr):
    """silu(bias + taps * window), float32."""
    total = tl.zeros(window[0].shape, tl.float32)
    if HAS_BIAS:
        total += taps[WIDTH].to(tl.float32)[None, :]
    for lag in tl.static_range(WIDTH):
        total += taps[lag].to(tl.float32)[None, :] * window[lag].to(tl.float32)
    return silu(total)


@triton.jit
def _updated(
    x, taps, bias, state, slots, y, sequence, begin, sequences, channels, end, x_row, state_slot, state_row,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Wait; convolve the channels of a program, update their states: outputs in chunks, zeros past `end`."""
    slot = tl.load(slots + sequence, mask=sequence < sequences, other=0).to(tl.int64)
    channel = begin + tl.arange(0, BLOCK_D)
    factors = ()
    for chunk in tl.static_range(CHUNKS):
        real = channel < end - chunk * BLOCK_D
        factors += (_taps(taps, bias, channel, chunk * BLOCK_D, real, WIDTH, HAS_BIAS),)
    wait_for_inputs(PDL)

    channel = channel[None, :]
    inputs = x + sequence.to(tl.int64) * x_row + channel
    outputs = y + sequence.to(tl.int64) * channels + channel
    rows = state + slot * state_slot + channel
    # Every load comes before the first store: they overlap, and a shifted row is read before it is written.
    # The same thread does both: a barrier between them would keep the compiler from copying ahead.
    windows = ()
    for chunk in tl.static_range(CHUNKS):
        at = chunk * BLOCK_D
        real = sequence < tl.where(begin + at < end, sequences, 0)
        windows += (_window(inputs, rows, at, real, state_row, WIDTH),)
    values = ()
    for chunk in tl.static_range(CHUNKS):
        at = chunk * BLOCK_D
        real = sequence < tl.where(begin + at < end, sequences, 0)
        for lag in tl.static_range(WIDTH - 1):
            older = rows + (WIDTH - 2 - lag) * state_row + at
            tl.store(older, windows[chunk][lag].to(state.dtype.element_ty), mask=real)
        value = _convolved(windows[chunk], factors[chunk], WIDTH, HAS_BIAS).to(y.dtype.element_ty)
        tl.store(outputs + at, value, mask=real)
        values += (tl.where(real, value, 0.0),)
    return values


@triton.jit
def _columns(rows):
    """(sequences, channels) -> (channels, sequences), at least LEAST: zeros for those missing."""
    if rows.shape[0] < LEAST:
        tl.static_assert(2 * rows.shape[0] == LEAST)
        both = tl.permute(tl.join(rows, tl.zeros_like(rows)), (2, 0, 1))
        rows = tl.reshape(both, (LEAST, rows.shape[1]))
    return factor(tl.trans(rows))


@triton.jit
def _store_sums(parts, sums, SEQUENCES: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_R: tl.constexpr):
    """(outputs, sequences) in tiles, as (SEQUENCES, OUTPUTS)."""
    for k in tl.static_range(len(sums)):
        i = tl.arange(0, sums[k].shape[1])[:, None]
        r = k * BLOCK_R + tl.arange(0, sums[k].shape[0])[None, :]
        tl.store(parts + i * OUTPUTS + r, tl.trans(sums[k]), mask=(i < SEQUENCES) & (r < OUTPUTS))


@triton.jit
def _added_up(parts, shares, SEQUENCES: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_R: tl.constexpr):
    """The sums of what the shares have stored, in their order, in tiles of (sequences, outputs)."""
    TILES: tl.constexpr = _tiles(OUTPUTS, BLOCK_R)
    AT_ONCE: tl.constexpr = 128 // SEQUENCES
    cell = tl.arange(0, SEQUENCES)[:, None] * OUTPUTS
    sums = ()
    for k in tl.static_range(TILES):
        sums += (tl.zeros((SEQUENCES, _size(k, OUTPUTS, BLOCK_R)), tl.float32),)
    for first in range(0, shares, AT_ONCE):
        under_way = ()
        for i in tl.static_range(AT_ONCE):
            at = parts + (first + i) * (SEQUENCES * OUTPUTS) + cell
            end = tl.where(first + i < shares, OUTPUTS, 0)
            for k in tl.static_range(TILES):
                r = k * BLOCK_R + tl.arange(0, _size(k, OUTPUTS, BLOCK_R))[None, :]
                under_way += (tl.load(at + r, mask=r < end, other=0.0, cache_modifier=".cg"),)
        for i in tl.static_range(AT_ONCE):
            added = ()
            for k in tl.static_range(TILES):
                added += (sums[k] + under_way[i * TILES + k],)
            sums = added
    return sums


@triton.jit(do_not_specialize=["sequences", "shares"])
def _projected_convs_kernel(
    x, taps, bias, state, slots, weight, y, projected, parts, counters,
    x_row, state_slot, state_row, sequences, channels, group_channels, shares,
    WIDTH: tl.constexpr, OUTPUTS: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
    SEQUENCES: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program: one token of SEQUENCES sequences, CHUNKS * BLOCK_D channels of a group.

    Programs are numbered by block of sequences, group and share.
    """
    TILES: tl.constexpr = _tiles(OUTPUTS, BLOCK_R)
    SIZE: tl.constexpr = SEQUENCES * OUTPUTS
    start_next(PDL)
    program = tl.program_id(0)
    whole, share = program // shares, program % shares
    groups = channels // group_channels
    group = whole % groups
    begin = group * group_channels + share * (CHUNKS * BLOCK_D)
    end = (group + 1) * group_channels
    values, sums = (), ()
    for _ in tl.static_range(CHUNKS):
        values += (tl.zeros((SEQUENCES, BLOCK_D), y.dtype.element_ty),)
    for k in tl.static_range(TILES):
        sums += (tl.zeros((_size(k, OUTPUTS, BLOCK_R), max(SEQUENCES, LEAST)), tl.float32),)
    sequence = ((whole // groups) * SEQUENCES + tl.arange(0, SEQUENCES))[:, None]
    # The compiler copies x_proj's weight into shared memory some steps ahead, and begins before the loop. So
    # that this does not wait for the inputs, the wait is part of the loop.
    for step in range(CHUNKS):
        if step == 0:
            values = _updated(
                x, taps, bias, state, slots, y, sequence, begin, sequences, channels, end,
                x_row, state_slot, state_row, WIDTH, HAS_BIAS, CHUNKS, BLOCK_D, PDL,
            )  # fmt: skip
        value = tl.zeros((SEQUENCES, BLOCK_D), y.dtype.element_ty)
        for chunk in tl.static_range(CHUNKS):
            value = tl.where(step == chunk, values[chunk], value)
        right = _columns(value)
        # Chunks past the end are the last one once more: their weights are multiplied by zeros.
        channel = tl.minimum(begin + step * BLOCK_D, end - BLOCK_D) + tl.arange(0, BLOCK_D)
        left = _weights(weight, channel, channels, OUTPUTS, BLOCK_R)
        added = ()
        for k in tl.static_range(TILES):
            added += (tl.dot(factor(left[k]), right, sums[k]),)
        sums = added

    _store_sums(parts + program * SIZE, sums, SEQUENCES, OUTPUTS, BLOCK_R)
    if last_to_finish(counters + whole, shares):
        added_up = _added_up(parts + whole * shares * SIZE, shares, SEQUENCES, OUTPUTS, BLOCK_R)
        to = projected + (sequence.to(tl.int64) * groups + group) * OUTPUTS
        for k in tl.static_range(TILES):
            r = k * BLOCK_R + tl.arange(0, _size(k, OUTPUTS, BLOCK_R))[None, :]
            rounded = added_up[k].to(projected.dtype.element_ty)
            tl.store(to + r, rounded, mask=(sequence < sequences) & (r < OUTPUTS))


def serves(x: Tensor, taps: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether the table wants it for rows such as x's, and it can: blocks of channels that lie in one group.

    taps: (D, K). weight: (D, R), x_proj's, a view of (R, D). All are of one type, of two bytes.
    """
    sequences, (channels, width) = x.shape[0], taps.shape
    config = tuning.configuration("projected_conv_updates", sequences, x.device)
    if not (config and sequences and x.element_size() == 2 and x.dtype == taps.dtype == weight.dtype):
        return False
    if not (2 <= width <= 4 and weight.T.is_contiguous()) or (width == 4 and taps.storage_offset() % 4):
        return False
    blocks = triton.cdiv(sequences, config["SEQUENCES"])
    return channels // groups % config["BLOCK_D"] == 0 and blocks * groups <= COUNTERS


def _outputs(
    x: Tensor, taps: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor, weight: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], groups, weight.shape[1]))


@operator("projected_conv_updates", mutates=("state",), fake=_outputs)
def projected_conv_updates(
    x: Tensor, taps: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor, weight: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """`causal_conv_update` of x, (S, D), and its output through x_proj, (S, groups, R), where it `serves`."""
    assert x.stride(-1) == 1 and state.stride(-1) == 1 and taps.is_contiguous()
    (sequences, channels), outputs = x.shape, weight.shape[1]
    y, projected = _outputs(x, taps, bias, state, slots, weight, groups)
    config = dict(tuning.configuration("projected_conv_updates", sequences, x.device))
    rows, block, threads = config["SEQUENCES"], config["BLOCK_D"], 32 * config["num_warps"]
    assert rows * block >= threads, "several threads would load what one of them overwrites"
    steps = channels // groups // block
    held = HELD * min(threads, 256) // (taps.shape[1] * rows * block * x.element_size())
    chunks = max(1, min(triton.cdiv(steps, config.pop("SHARES")), held))
    shares = triton.cdiv(steps, chunks)
    programs = triton.cdiv(sequences, rows) * groups * shares
    copied = triton.cdiv(outputs, config["BLOCK_R"]) * config["BLOCK_R"] * block * x.element_size()
    parts = x.new_empty((programs, rows, outputs), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _projected_convs_kernel[(programs,)](
            x, taps, bias, state, slots, weight, y, projected, parts, counters(x.device),
            x.stride(0), state.stride(0), state.stride(1), sequences, channels, channels // groups, shares,
            WIDTH=taps.shape[1], OUTPUTS=outputs, HAS_BIAS=bias is not None, CHUNKS=chunks,
            num_stages=min(chunks + 1, ROOM // copied), enable_fp_fusion=True,
            **config, **launch_options(x.device),
        )  # fmt: skip
    return y, projected
