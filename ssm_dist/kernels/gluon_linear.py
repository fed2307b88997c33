"""Linear layers of up to 16 rows on Hopper, with the weight in registers before the input is there (Gluon).

`triton_linear_kernels` brings the weight through shared memory once the input is there. Here a lane asks for
its part of the weight in the very order in which the tensor cores want it, 16 bytes at a time, and holds it
while it waits for the kernel before: m16n8k16 takes 16 outputs from the left and 8 rows of x from the right,
and since a sum over k may go in any order, the 8 neighbours in memory that a lane loads count as the k that
are its own, in x as well. Nothing is shuffled, and nothing goes through shared memory but the sums of the
warps, which share the width.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ssm_dist.kernels.dependent_launch import launch_options
from ssm_dist.kernels.gluon_warp import WORD
from ssm_dist.kernels.triton_shares import COUNTERS, counters
from ssm_dist.kernels.tuning import Configuration

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # the latter in Triton 3.6

STEP = gl.constexpr(32)
"""Numbers of a row that a quad of lanes loads at once."""


@gluon.constexpr_function
def _lanes(warps, registers):
    """Element registers * t + r is register r of thread t."""
    low = registers.bit_length() - 1
    return gl.DistributedLinearLayout(
        [[1 << k] for k in range(low)],
        [[registers << k] for k in range(5)],
        [[32 * registers << k] for k in range(warps.bit_length() - 1)],
        [],
        [32 * registers * warps],
    )


@gluon.constexpr_function
def _assembly(half):
    kind = "f16" if half else "bf16"
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )


@gluon.jit
def _product(a, b, c, HALF: gl.constexpr):
    """Outputs a (16 x 16) times rows b (16 x 8) plus c: 4, 2 and 4 registers of a lane."""
    return gl.inline_asm_elementwise(
        _assembly(HALF), "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3]],
        (gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _words(pointer, wanted, WARPS: gl.constexpr):
    """16 bytes a lane from `pointer`, four words of two numbers."""
    LANES: gl.constexpr = _lanes(WARPS, 1)
    four = gl.load(pointer, mask=wanted, other=0).reshape([32 * WARPS, 2, 2])
    even, odd = gl.split(four)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return (
        gl.convert_layout(first, LANES, assert_trivial=True),
        gl.convert_layout(second, LANES, assert_trivial=True),
        gl.convert_layout(third, LANES, assert_trivial=True),
        gl.convert_layout(fourth, LANES, assert_trivial=True),
    )


@gluon.jit
def _weights(row, k, place, end, columns_left, TILES: gl.constexpr, WARPS: gl.constexpr):
    """Of each tile of 16 outputs, two rows a lane."""
    found = ()
    for m in gl.static_range(TILES):
        found += (
            _words(row[2 * m] + place, (k < end) & (columns_left > 16 * m), WARPS),
            _words(row[2 * m + 1] + place, (k < end) & (columns_left > 16 * m + 8), WARPS),
        )
    return found


@gluon.jit(do_not_specialize=["tokens", "columns"])
def few_rows_kernel(
    x, weight, bias, y, parts, counters, x_row, tokens, columns,
    K: gl.constexpr, SHARES: gl.constexpr, ROWS: gl.constexpr, HAS_BIAS: gl.constexpr, PDL: gl.constexpr,
    TILES: gl.constexpr, DEPTH: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """One program: 16 * TILES numbers of all rows, at most 8 * ROWS, summed over one of SHARES spans of K.

    A warp takes every WARPS-th step of the span, and asks for the weight DEPTH steps ahead.
    """
    HALF: gl.constexpr = y.dtype.element_ty == gl.float16
    SPAN: gl.constexpr = (K // STEP + SHARES - 1) // SHARES * STEP
    STEPS: gl.constexpr = (SPAN + STEP * WARPS - 1) // (STEP * WARPS)
    FEW: gl.constexpr = DEPTH if DEPTH < STEPS else STEPS
    if PDL:
        gdc_launch_dependents()
    tile = gl.program_id(0) // SHARES
    share = gl.program_id(0) % SHARES
    begin = share * SPAN
    end = gl.minimum(begin + SPAN, K)
    n0 = tile * (16 * TILES)

    word = gl.arange(0, 128 * WARPS, _lanes(WARPS, 4))
    thread = word // 4
    i = thread % 4
    g = thread // 4 % 8
    k = begin + thread // 32 * STEP + 8 * i
    at = k // 2 + word % 4
    rows = ()
    for m in gl.static_range(2 * TILES):
        n = gl.minimum(n0 + 8 * m + g, columns - 1).to(gl.int64)
        rows += (weight.to(WORD) + gl.multiple_of(n * (K // 2), 4) + at,)
    held = ()
    for c in gl.static_range(FEW):
        place = c * (STEP * WARPS // 2)
        held += (_weights(rows, k + 2 * place, place, end, columns - n0, TILES, WARPS),)
    if PDL:
        gdc_wait()

    inputs = ()
    for r in gl.static_range(ROWS):
        token = g + 8 * r
        inputs += (x.to(WORD) + (gl.multiple_of(token.to(gl.int64) * (x_row // 2), 4) + at),)
    zero = gl.zeros([32 * WARPS], gl.float32, _lanes(WARPS, 1))
    sums = ()
    for _ in gl.static_range(TILES * ROWS):
        sums += ((zero, zero, zero, zero),)
    for c in gl.static_range(STEPS):
        now = held[c % FEW]
        place = c * (STEP * WARPS // 2)
        if c + FEW < STEPS:
            further = place + FEW * (STEP * WARPS // 2)
            later = _weights(rows, k + 2 * further, further, end, columns - n0, TILES, WARPS)
            kept = ()
            for d in gl.static_range(FEW):
                kept += (later if d == c % FEW else held[d],)
            held = kept
        new = ()
        for r in gl.static_range(ROWS):
            given = _words(inputs[r] + place, (k + 2 * place < end) & (g + 8 * r < tokens), WARPS)
            for m in gl.static_range(TILES):
                near = now[2 * m]
                far = now[2 * m + 1]
                total = _product(
                    (near[0], far[0], near[1], far[1]), (given[0], given[1]), sums[r * TILES + m], HALF
                )
                new += (_product((near[2], far[2], near[3], far[3]), (given[2], given[3]), total, HALF),)
        sums = new

    _finish(sums, bias, y, parts, counters, tile, share, n0, tokens, columns,
            SHARES, ROWS, HAS_BIAS, TILES, WARPS)  # fmt: skip


@gluon.jit
def _finish(
    sums, bias, y, parts, counters, tile, share, n0, tokens, columns,
    SHARES: gl.constexpr, ROWS: gl.constexpr, HAS_BIAS: gl.constexpr, TILES: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Add up what the warps have, then the shares, and store it."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    ACROSS: gl.constexpr = gl.BlockedLayout([WARPS, 1], [1, 32], [1, WARPS], [1, 0])
    ALONG: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    LINE: gl.constexpr = gl.SliceLayout(0, ACROSS)
    lane = gl.arange(0, 128, LINE) // 4
    register = gl.arange(0, 128, LINE) % 4
    memory = gl.allocate_shared_memory(gl.float32, [WARPS, 128], FLAT)
    size = tokens * columns
    totals = ()
    for part in gl.static_range(TILES * ROWS):
        s = sums[part]
        joined = gl.join(gl.join(s[0], s[2]), gl.join(s[1], s[3]))  # lane, then register 0, 1, 2, 3
        barrier()
        memory.store(gl.convert_layout(joined.reshape([WARPS, 128]), ALONG))
        barrier()
        totals += (gl.sum(memory.load(ACROSS), 0),)
    for part in gl.static_range(TILES * ROWS):
        n = n0 + part % TILES * 16 + lane // 4 + register // 2 * 8
        token = part // TILES * 8 + lane % 4 * 2 + register % 2
        inside = (token < tokens) & (n < columns)
        cell = token.to(gl.int64) * columns + n
        total = totals[part]
        if SHARES > 1:
            gl.store(parts + share * size + cell, total, mask=inside)
        else:
            if HAS_BIAS:
                total += gl.load(bias + n, mask=inside, other=0.0).to(gl.float32)
            gl.store(y + cell, total.to(y.dtype.element_ty), mask=inside)
    if SHARES > 1:
        barrier()
        if gl.atomic_add(counters + tile, 1, sem="acq_rel") == SHARES - 1:
            gl.store(counters + tile, 0)
            for part in gl.static_range(TILES * ROWS):
                n = n0 + part % TILES * 16 + lane // 4 + register // 2 * 8
                token = part // TILES * 8 + lane % 4 * 2 + register % 2
                inside = (token < tokens) & (n < columns)
                cell = token.to(gl.int64) * columns + n
                total = gl.zeros([128], gl.float32, LINE)
                for other in gl.static_range(SHARES):
                    at = parts + other * size + cell
                    total += gl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
                if HAS_BIAS:
                    total += gl.load(bias + n, mask=inside, other=0.0).to(gl.float32)
                gl.store(y + cell, total.to(y.dtype.element_ty), mask=inside)


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, config: Configuration) -> None:
    """x (T, K) times the rows of a contiguous weight (N, K) into y (T, N); T at most 16, 16 bits, aligned.

    config: TILES of 16 outputs a program, DEPTH, PROGRAMS to aim at by sharing sums, num_warps.
    """
    (tokens, width), columns, warps = x.shape, weight.shape[0], config["num_warps"]
    tiles = triton.cdiv(columns, 16 * config["TILES"])
    steps = triton.cdiv(width, 32 * warps)
    shares = min(max(1, config["PROGRAMS"] // tiles), steps) if tiles <= COUNTERS else 1
    parts = y if shares == 1 else x.new_empty((shares, tokens, columns), dtype=torch.float32)
    few_rows_kernel[(tiles * shares,)](
        x, weight, bias, y, parts, counters(x.device), x.stride(0), tokens, columns,
        K=width, SHARES=shares, ROWS=triton.cdiv(tokens, 8), HAS_BIAS=bias is not None,
        TILES=config["TILES"], DEPTH=config["DEPTH"], WARPS=warps, num_warps=warps, enable_fp_fusion=True,
        **launch_options(x.device),
    )  # fmt: skip
