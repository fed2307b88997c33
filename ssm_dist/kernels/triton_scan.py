"""The selective scan in plain Triton, for every GPU; gluon_scan.py holds the faster form for Hopper.

One program runs one item, a run of tokens of one sequence, for BLOCK channels: a channel a lane, its N states
in N registers. B and C of a token are scalars, the same for all lanes; what a token needs is loaded one token
ahead. Items are whole sequences where sequences x channels fill the GPU. Where they do not, sequences are cut
into chunks, and scanned twice:

1. summary: each chunk's end state from a zero start (a sequence's first chunk: from its slot) and the sum of
   its time steps, because the decay over a whole chunk is exp(A * sum of dt);
2. the main pass: each chunk folds the summaries before it in its sequence into its entering state, and scans.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.kernels import backend
from ssm_dist.kernels.gluon_form import choose, serves, streams
from ssm_dist.kernels.gluon_support import gluon_module
from ssm_dist.kernels.triton_common import LOG2_E, chunk_of_program, exp2, only_if, silu, softplus

BLOCK = 32
"""Channels a program: one warp, so that few channels still spread over all multiprocessors."""
FULL = 1056
"""Programs that fill a large GPU: 132 multiprocessors, 8 warps each."""
SHORTEST = 64
"""Tokens under which a chunk costs more in folding states than it gains."""


@triton.jit
def _row(pointer, N: tl.constexpr):
    """N neighbours in memory as a tuple of scalars."""
    row = ()
    for n in tl.static_range(N):
        row += (tl.load(pointer + n),)
    return row


@triton.jit(do_not_specialize=["sequences", "group_blocks"])
def _scan_kernel(
    x, dt, z, A_log, B, C, skip, dt_bias, y, state, seq_offsets, slots, ends, sums,
    sequences, channels, group_channels, group_blocks,
    x_row, dt_row, z_row, B_row, B_group, C_row, C_group, state_slot,
    N: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, BLOCK_S: tl.constexpr, SUMMARY: tl.constexpr,
):  # fmt: skip
    """One program: an item and BLOCK channels of a group. Summaries: ends (items, D, N), sums (items, D)."""
    HELD: tl.constexpr = N if N <= 32 else 0  # more rows of B and C than these, and the registers overflow
    blocks = group_blocks * (channels // group_channels)
    item = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    group = block // group_blocks
    within = (block % group_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = within < group_channels
    channel = group * group_channels + within
    if CHUNK:
        sequence, first, last, begin = chunk_of_program(seq_offsets, sequences, item, CHUNK, BLOCK_S)
        end = tl.minimum(begin + CHUNK, last)
        earlier = (begin - first) // CHUNK
    else:
        sequence = item
        first = tl.load(seq_offsets + sequence)
        last = tl.load(seq_offsets + sequence + 1)
        begin = first
        end = last
        earlier = 0
    if begin >= end:
        return
    if SUMMARY and end == last:
        return

    state += tl.load(slots + sequence).to(tl.int64) * state_slot
    bias = tl.load(dt_bias + channel, mask=inside, other=0.0).to(tl.float32)
    through = tl.load(skip + channel, mask=inside, other=0.0).to(tl.float32)
    fresh = within < only_if(earlier == 0, group_channels)
    A, s = (), ()
    for n in tl.static_range(N):
        A += (-tl.exp(tl.load(A_log + channel * N + n, mask=inside, other=0.0).to(tl.float32)) * LOG2_E,)
        s += (tl.load(state + channel * N + n, mask=fresh, other=0.0).to(tl.float32),)
    if CHUNK and not SUMMARY:
        summary = (item - earlier).to(tl.int64) * channels + channel
        for _ in range(earlier):
            passed = tl.load(sums + summary, mask=inside, other=0.0)
            folded = ()
            for n in tl.static_range(N):
                end_n = tl.load(ends + summary * N + n, mask=inside, other=0.0)
                folded += (tl.fma(exp2(passed * A[n]), s[n], end_n),)
            s = folded
            summary += channels

    token = begin.to(tl.int64)
    x += token * x_row + channel
    dt += token * dt_row + channel
    z += token * z_row + channel
    y += token * channels + channel
    B += token * B_row + group * B_group
    C += token * C_row + group * C_group
    x_next = tl.load(x, mask=inside, other=0.0)
    dt_next = tl.load(dt, mask=inside, other=0.0)
    z_next = tl.load(z, mask=inside, other=0.0)
    B_next = _row(B, HELD)
    C_next = _row(C, HELD)
    passed = tl.zeros([BLOCK], tl.float32)
    for left in range(end - begin, 0, -1):
        u = x_next.to(tl.float32)
        step = softplus(dt_next.to(tl.float32) + bias)
        gate = z_next.to(tl.float32)
        B_now = B_next + _row(B + HELD, N - HELD)
        C_now = C_next + _row(C + HELD, N - HELD)
        onward = tl.minimum(left - 1, 1)  # the last token stays where it is, so that loads need no mask
        x += onward * x_row
        dt += onward * dt_row
        z += onward * z_row
        B += onward * B_row
        C += onward * C_row
        x_next = tl.load(x, mask=inside, other=0.0)
        dt_next = tl.load(dt, mask=inside, other=0.0)
        z_next = tl.load(z, mask=inside, other=0.0)
        B_next = _row(B, HELD)
        C_next = _row(C, HELD)

        out = through * u
        after = ()
        for n in tl.static_range(N):
            s_n = tl.fma(exp2(step * A[n]), s[n], step * u * B_now[n].to(tl.float32))
            out = tl.fma(s_n, C_now[n].to(tl.float32), out)
            after += (s_n,)
        s = after
        if SUMMARY:
            passed += step
        else:
            tl.store(y, (out * silu(gate)).to(y.dtype.element_ty), mask=inside)
            y += channels

    if SUMMARY:
        summary = item.to(tl.int64) * channels + channel
        tl.store(sums + summary, passed, mask=inside)
        for n in tl.static_range(N):
            tl.store(ends + summary * N + n, s[n], mask=inside)
    elif end == last:
        for n in tl.static_range(N):
            tl.store(state + channel * N + n, s[n].to(state.dtype.element_ty), mask=inside)


def chunk_tokens(tokens: int, sequences: int, channels: int) -> int:
    """Tokens of a chunk (a power of two), or 0 for whole sequences; from sizes the host knows."""
    programs = sequences * triton.cdiv(channels, BLOCK)
    chunks = min(FULL // programs, tokens // SHORTEST)
    return triton.next_power_of_2(triton.cdiv(tokens, chunks)) if chunks >= 4 else 0


def scan(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    state: Tensor, seq_offsets: Tensor, slots: Tensor, chunk: int,
) -> Tensor:  # fmt: skip
    """`selective_scan` by the plain kernel, in chunks of `chunk` tokens (0: whole sequences)."""
    (tokens, channels), (_, groups, states), sequences = x.shape, B.shape, slots.shape[0]
    y = x.new_empty(tokens, channels)
    items = sequences + tokens // chunk if chunk else sequences
    kept = items if chunk else 0
    ends = state.new_empty((kept, channels, states), dtype=torch.float32)
    sums = state.new_empty((kept, channels), dtype=torch.float32)
    group_blocks = triton.cdiv(channels // groups, BLOCK)
    if not tokens:
        return y
    for summary in (True, False) if chunk else (False,):
        with torch.cuda.device_of(x):
            _scan_kernel[(items * groups * group_blocks,)](
                x, dt, z, A_log, B, C, D, dt_bias, y, state, seq_offsets, slots, ends, sums,
                sequences, channels, channels // groups, group_blocks,
                x.stride(0), dt.stride(0), z.stride(0), B.stride(0), B.stride(1), C.stride(0), C.stride(1),
                state.stride(0), N=states, BLOCK=BLOCK, CHUNK=chunk,
                BLOCK_S=min(triton.next_power_of_2(sequences), 256), SUMMARY=summary,
                num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip
    return y


@backend.register("selective_scan", "triton")
@torch.library.custom_op("ssm_dist::selective_scan", mutates_args=("state",))
def selective_scan(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    state: Tensor, seq_offsets: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    """`ssm_dist.kernels.selective_scan`; last dimensions, A_log and each slot must be contiguous."""
    assert x.shape[1] % B.shape[1] == 0 and x.dtype != torch.float64
    assert all(t.stride(-1) == 1 for t in (x, dt, z, B, C))
    assert A_log.is_contiguous() and state.stride()[1:] == (A_log.shape[1], 1)
    if not x.numel():
        return x.new_empty(x.shape)
    arguments = (x, dt, A_log, B, C, D, z, dt_bias, state, seq_offsets, slots)
    sizes = (x.shape[0], slots.shape[0], x.shape[1])
    gluon = gluon_module("gluon_scan", x.device)
    if gluon and serves(x, dt, z, B, C):
        return gluon.scan(*arguments, choose(*sizes, streams(x, dt, z, B, C)))
    return scan(*arguments, chunk_tokens(*sizes))


@selective_scan.register_fake
def _(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    state: Tensor, seq_offsets: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)
