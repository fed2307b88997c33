"""The selective scan for Hopper in Triton's Gluon dialect; `gluon_warp` says how a warp does its share.

One program runs one item, a run of tokens of one sequence, for 16 channels a warp. Warps work alone;
`gluon_stream` brings their inputs through shared memory, `gluon_warp` straight into registers. Items are
whole sequences where sequences x channels fill the GPU. Where they do not, sequences are cut into chunks and
scanned in two passes: the first scans the first chunk of each sequence, and summarises the others but the
last (end state from a zero start, sum of dt); the second folds the summaries before a chunk into its entering
state, and scans it. The second starts while the first ends (`dependent_launch`): all else that it reads was
there before the first, which is launched in the ordinary way.

Programs without work are the last of a launch: among the others, they would leave multiprocessors uneven.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ssm_dist.kernels.carveout import let_others_beside
from ssm_dist.kernels.dependent_launch import launch_options
from ssm_dist.kernels.gluon_form import Form
from ssm_dist.kernels.gluon_stream import stream
from ssm_dist.kernels.gluon_warp import advance, lanes, shuffle
from ssm_dist.kernels.triton_common import LOG2_E


@gluon.jit
def _find_item(seq_offsets, sequences, item, chunk, cut):
    """Sequence of the item, and which of its chunks but the last that is, if below their number.

    Were all sequences longer by what their first chunks are shorter by, a sequence's items would begin with
    its first token's number // chunk, and be no fewer than its chunks but one.
    """
    low = 0
    high = sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        if (gl.load(seq_offsets + middle) + middle * cut) // chunk <= item:
            low = middle
        else:
            high = middle - 1
    return low, item - (gl.load(seq_offsets + low) + low * cut) // chunk


@gluon.jit
def _load_states(pointer, inside, N: gl.constexpr):
    """A lane's states of its two channels, by channel, tile and column; pointer: its first."""
    H: gl.constexpr = N // 8
    s = ()
    for k in gl.static_range(4 * H):
        at = pointer + (k // (2 * H) * N + k % 2 * H + k // 2 % H)
        s += (gl.load(at, mask=inside, other=0.0).to(gl.float32),)
    return s


@gluon.jit
def _store_states(pointer, s, inside, N: gl.constexpr):
    H: gl.constexpr = N // 8
    for k in gl.static_range(4 * H):
        at = pointer + (k // (2 * H) * N + k % 2 * H + k // 2 % H)
        gl.store(at, s[k].to(pointer.dtype.element_ty), mask=inside)


@gluon.jit
def _load_summaries(ends, sums, left, inside, channels, N: gl.constexpr):
    """End states and sums of dt of four items; where there are not as many, what leaves a state as it is."""
    states, passed = (), ()
    for j in gl.static_range(4):
        real = inside & (j < left)
        passed += ((gl.load(sums, mask=real, other=0.0), gl.load(sums + 1, mask=real, other=0.0)),)
        states += (_load_states(ends, real, N),)
        ends += channels * N
        sums += channels
    return states, passed


@gluon.jit
def _fold(ends, sums, earlier, A, inside, channels, N: gl.constexpr):
    """The state after `earlier` summarised items; the first one, at the pointers, began from the slot."""
    H: gl.constexpr = N // 8
    s = _load_states(ends, inside, N)
    ends += channels * N
    sums += channels
    ahead = _load_summaries(ends, sums, earlier - 1, inside, channels, N)
    for left in range(earlier - 1, 0, -4):
        states, passed = ahead
        ends += 4 * channels * N
        sums += 4 * channels
        ahead = _load_summaries(ends, sums, left - 4, inside, channels, N)
        for j in gl.static_range(4):
            folded = ()
            for n in gl.static_range(4 * H):
                folded += (gl.fma(gl.exp2(passed[j][n // (2 * H)] * A[n]), s[n], states[j][n]),)
            s = folded
    return s


@gluon.jit
def _advance(
    s, A, sources, rows, y, y_row, bias, skip, lane, group_channels, tokens, N: gl.constexpr,
    HALF: gl.constexpr, DEPTH: gl.constexpr, EXTRA: gl.constexpr, STAGES: gl.constexpr, OUTPUT: gl.constexpr,
):  # fmt: skip
    if STAGES:
        s, passed = stream(
            s, A, sources, rows, y, y_row, bias, skip, lane, group_channels, tokens,
            HALF, STAGES, EXTRA, OUTPUT,
        )  # fmt: skip
    else:
        s, passed = advance(
            s, A, sources, rows, y, y_row, bias, skip, lane, tokens, N, HALF, DEPTH, EXTRA, OUTPUT
        )
    return s, passed


@gluon.jit(do_not_specialize=["sequences", "items", "chunk", "cut", "group_blocks"])
def scan_kernel(
    x, dt, z, A_log, B, C, skip, dt_bias, y, state, seq_offsets, slots, ends, sums,
    sequences, items, chunk, cut, channels, group_channels, group_blocks,
    x_row, dt_row, z_row, B_row, B_group, C_row, C_group, state_slot,
    N: gl.constexpr, WARPS: gl.constexpr, DEPTH: gl.constexpr, EXTRA: gl.constexpr,
    STAGES: gl.constexpr, CHUNKED: gl.constexpr, SECOND: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One program: an item, 16 channels of a group a warp. Summaries: ends (items, D, N), sums (items, D)."""
    LANES: gl.constexpr = lanes(WARPS)
    HALF: gl.constexpr = y.dtype.element_ty == gl.float16
    blocks = group_blocks * (channels // group_channels)
    item = gl.program_id(0) // blocks
    block = gl.program_id(0) % blocks
    group = block // group_blocks
    sequence = item
    place = 0
    if CHUNKED:
        sequence, place = _find_item(seq_offsets, sequences, item, chunk, cut)
        if not SECOND:  # after the chunks, sequences that are one, and empty ones
            sequence = gl.where(item < items, sequence, item - items)
            place = gl.where(item < items, place, 0)
    first = gl.load(seq_offsets + sequence)
    last = gl.load(seq_offsets + sequence + 1)
    begin = first
    end = last
    idle = begin == end
    if CHUNKED:
        shifted = first - cut + (place + 1 if SECOND else place) * chunk
        begin = gl.maximum(shifted, first)
        end = gl.minimum(shifted + chunk, last)
        idle = begin >= last
        if not SECOND:
            idle = idle | ((end == last) != (item >= items))
    if PDL and not SECOND:
        gdc_launch_dependents()
    if idle:
        if PDL and SECOND:
            gdc_wait()
        return

    thread = gl.arange(0, 32 * WARPS, LANES)
    g = thread % 8
    i = thread // 8 % 4
    start = block % group_blocks * (16 * WARPS)
    within = start + thread // 32 * 16 + 2 * g
    inside = within < group_channels
    channel = group * group_channels + within
    cell = channel * N + i * (N // 4)
    token = begin.to(gl.int64)
    tokens = end - begin
    rows = (x_row, dt_row, z_row, B_row, C_row)
    sources = (
        x + token * x_row + group * group_channels,
        dt + token * dt_row + group * group_channels,
        z + token * z_row + group * group_channels,
        B + token * B_row + group * B_group,
        C + token * C_row + group * C_group,
    )
    if not STAGES:
        sources = (
            x + token * x_row + (i * x_row + channel),
            dt + token * dt_row + (i * dt_row + channel),
            z + token * z_row + (i * z_row + channel),
            B + token * B_row + group * B_group + (i * B_row + N // 8 * g),
            C + token * C_row + group * C_group + ((g // 2 + g % 2 * 4) * C_row + N // 4 * i),
        )
    bias = (
        gl.load(dt_bias + channel, mask=inside, other=0.0).to(gl.float32),
        gl.load(dt_bias + channel + 1, mask=inside, other=0.0).to(gl.float32),
    )
    through = (
        gl.load(skip + channel, mask=inside, other=0.0).to(gl.float32),
        gl.load(skip + channel + 1, mask=inside, other=0.0).to(gl.float32),
    )
    logarithms = _load_states(A_log + cell, inside, N)
    A = ()
    for k in gl.static_range(N // 2):
        A += (gl.exp(logarithms[k]) * -LOG2_E,)
    state += gl.load(slots + sequence).to(gl.int64) * state_slot + cell
    lane = (g, i, start, inside)
    y += token * channels + (i * channels + channel)
    ends += item.to(gl.int64) * channels * N + cell
    sums += item.to(gl.int64) * channels + channel

    if CHUNKED and not SECOND:
        if begin == first:
            s = _load_states(state, inside, N)
            s, passed = _advance(
                s, A, sources, rows, y, channels, bias, through, lane, group_channels, tokens,
                N, HALF, DEPTH, EXTRA, STAGES, True,
            )  # fmt: skip
            if end == last:
                _store_states(state, s, inside, N)
            else:
                _store_states(ends, s, inside, N)
        else:
            s = ()
            for k in gl.static_range(N // 2):
                s += (gl.zeros_like(A[k]),)
            s, passed = _advance(
                s, A, sources, rows, y, channels, bias, through, lane, group_channels, tokens,
                N, HALF, DEPTH, EXTRA, STAGES, False,
            )  # fmt: skip
            _store_states(ends, s, inside, N)
            for b in gl.static_range(2):
                half = passed[b] + shuffle(passed[b], "bfly", 1)
                gl.store(sums + b, half + shuffle(half, "bfly", 2), mask=inside & (i == 0))
    else:
        if SECOND:
            if PDL:
                gdc_wait()
            s = _fold(
                ends - place.to(gl.int64) * channels * N, sums - place.to(gl.int64) * channels, place + 1,
                A, inside, channels, N,
            )  # fmt: skip
        else:
            s = _load_states(state, inside, N)
        s, passed = _advance(
            s, A, sources, rows, y, channels, bias, through, lane, group_channels, tokens,
            N, HALF, DEPTH, EXTRA, STAGES, True,
        )  # fmt: skip
        if end == last:
            _store_states(state, s, inside, N)


def scan(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    state: Tensor, seq_offsets: Tensor, slots: Tensor, form: Form,
) -> Tensor:  # fmt: skip
    """`selective_scan` in that form, for inputs that it `serves`."""
    (tokens, channels), (_, groups, states), sequences = x.shape, B.shape, slots.shape[0]
    y = x.new_empty(tokens, channels)
    items = (tokens + sequences * form.cut) // form.chunk if form.chunk else 0
    ends = state.new_empty((items, channels, states), dtype=torch.float32)
    sums = state.new_empty((items, channels), dtype=torch.float32)
    group_blocks = triton.cdiv(channels // groups, 16 * form.warps)
    if not tokens:
        return y
    dependent = launch_options(x.device) if form.chunk else {"PDL": False}
    for second in (False, True) if items else (False,):
        launch = dependent if second else {"PDL": dependent["PDL"]}  # the second pass alone starts early
        with torch.cuda.device_of(x):
            launched = scan_kernel[((items if second else items + sequences) * groups * group_blocks,)](
                x, dt, z, A_log, B, C, D, dt_bias, y, state, seq_offsets, slots, ends, sums,
                sequences, items, form.chunk, form.cut, channels, channels // groups, group_blocks,
                x.stride(0), dt.stride(0), z.stride(0), B.stride(0), B.stride(1), C.stride(0), C.stride(1),
                state.stride(0), N=states, WARPS=form.warps, DEPTH=form.depth, EXTRA=form.extra,
                STAGES=form.stages, CHUNKED=form.chunk > 0, SECOND=second,
                num_warps=form.warps, maxnreg=form.registers, enable_fp_fusion=True, **launch,
            )  # fmt: skip
        let_others_beside(launched)
    return y
