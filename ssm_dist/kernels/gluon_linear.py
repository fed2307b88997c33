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
from triton.experimental.gluon.language.nvidia.ampere import async_copy
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
def _registers(four, THREADS: gl.constexpr, WARPS: gl.constexpr):
    """The four words that each lane holds of a tensor (.., 2, 2), one by one."""
    LANES: gl.constexpr = _lanes(WARPS, 1)
    even, odd = gl.split(four)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    words = ()
    for k in gl.static_range(4):
        word = (first, second, third, fourth)[k]
        if THREADS == 3:  # rows, warps, lanes of a row
            word = word.permute((1, 0, 2)).reshape([32 * WARPS])
        words += (gl.convert_layout(word, LANES, assert_trivial=True),)
    return words


@gluon.jit
def _weights(weight, n, place, k, c: gl.constexpr, end, columns, K: gl.constexpr, WARPS: gl.constexpr):
    """A lane's words of outputs n and n + 8 in step c; place, k: its first word and number in step 0."""
    near = weight + (gl.multiple_of(n.to(gl.int64) * (K // 2), 4) + place + c * (WARPS * STEP // 2))
    wanted = k + c * (WARPS * STEP) < end
    far = near + 8 * (K // 2)
    near_words = gl.load(near, mask=wanted & (n < columns), other=0).reshape([32 * WARPS, 2, 2])
    far_words = gl.load(far, mask=wanted & (n + 8 < columns), other=0).reshape([32 * WARPS, 2, 2])
    return _registers(near_words, 1, WARPS), _registers(far_words, 1, WARPS)


@gluon.jit
def _copy_inputs(x, x_row, tokens, begin, end, inputs, STEPS: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """Begin to copy a span of x, (STEPS, 8 ROWS, 16 WARPS) words; zeros beyond its end and the tokens."""
    WIDE: gl.constexpr = min(4 * WARPS, 32)
    COPY: gl.constexpr = gl.BlockedLayout([1, 4], [32 // WIDE, WIDE], [WARPS, 1], [1, 0])
    token = gl.arange(0, 8 * ROWS, gl.SliceLayout(1, COPY))
    word = gl.arange(0, 16 * WARPS, gl.SliceLayout(0, COPY))
    rows = gl.multiple_of(token.to(gl.int64) * (x_row // 2), 4)
    last = gl.multiple_of(end // 2, 4)
    for c in gl.static_range(STEPS):
        place = gl.multiple_of(begin // 2, 4) + (c * 16 * WARPS + word)
        at = x.to(WORD) + (rows[:, None] + place[None, :])
        async_copy.async_copy_global_to_shared(
            inputs.index(c), at, mask=(token < tokens)[:, None] & (place < last)[None, :]
        )
    async_copy.commit_group()


@gluon.constexpr_function
def _rows_of_words(warps):
    """As `_lanes(warps, 4)`, but in two dimensions: 8 rows of 16 words a warp."""
    bases = [[0, 16 << k] for k in range(warps.bit_length() - 1)]
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2]], lanes, bases, [], [8, 16 * warps])


@gluon.constexpr_function
def _ahead(steps, depth):
    """Steps that the weight is asked for ahead: they divide those of a tile."""
    return max(n for n in range(1, depth + 1) if steps % n == 0)


@gluon.jit(do_not_specialize=["tokens", "columns", "programs"])
def few_rows_kernel(
    x, weight, bias, y, parts, counters, x_row, tokens, columns, programs,
    K: gl.constexpr, SHARES: gl.constexpr, ROWS: gl.constexpr, HAS_BIAS: gl.constexpr, PDL: gl.constexpr,
    DEPTH: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """One program: of all rows, at most 8 * ROWS, every `programs`-th 16 outputs, over one of SHARES spans of K.

    A warp takes every WARPS-th step of the span.
    """
    HALF: gl.constexpr = y.dtype.element_ty == gl.float16
    SPAN: gl.constexpr = (K // STEP + SHARES - 1) // SHARES * STEP
    STEPS: gl.constexpr = (SPAN + STEP * WARPS - 1) // (STEP * WARPS)
    AHEAD: gl.constexpr = _ahead(STEPS, DEPTH)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    ROWS_APART: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 2, order=[1, 0])
    if PDL:
        gdc_launch_dependents()
    share = gl.program_id(0) % SHARES
    worker = gl.program_id(0) // SHARES
    begin = share * SPAN
    end = gl.minimum(begin + SPAN, K)
    tiles = gl.cdiv(columns, 16)

    word = gl.arange(0, 128 * WARPS, _lanes(WARPS, 4))
    thread = word // 4
    g = thread // 4 % 8
    k = begin + thread // 32 * STEP + 8 * (thread % 4)
    place = k // 2 + word % 4
    weight = weight.to(WORD)
    held = ()
    for c in gl.static_range(AHEAD):
        held += (_weights(weight, 16 * worker + g, place, k, c, end, columns, K, WARPS),)
    if PDL:
        gdc_wait()
    inputs = gl.allocate_shared_memory(gl.int32, [STEPS, 8 * ROWS, 16 * WARPS], ROWS_APART)
    _copy_inputs(x, x_row, tokens, begin, end, inputs, STEPS, ROWS, WARPS)
    joint = gl.allocate_shared_memory(gl.float32, [ROWS, WARPS, 128], FLAT)
    async_copy.wait_group(0)

    zero = gl.zeros([32 * WARPS], gl.float32, _lanes(WARPS, 1))
    for tile in range(worker, tiles, programs):
        sums = ()
        for _ in gl.static_range(ROWS):
            sums += ((zero, zero, zero, zero),)
        for c in gl.static_range(STEPS):
            near, far = held[c % AHEAD]
            n = 16 * (tile + programs if c + AHEAD >= STEPS else tile) + g
            later = _weights(weight, n, place, k, (c + AHEAD) % STEPS, end, columns, K, WARPS)
            kept = ()
            for d in gl.static_range(AHEAD):
                kept += (later if d == c % AHEAD else held[d],)
            held = kept
            new = ()
            for r in gl.static_range(ROWS):
                given = inputs.index(c).slice(8 * r, 8, dim=0).load(_rows_of_words(WARPS))
                b = _registers(given.reshape([8, WARPS, 4, 2, 2]), 3, WARPS)
                total = _product((near[0], far[0], near[1], far[1]), (b[0], b[1]), sums[r], HALF)
                new += (_product((near[2], far[2], near[3], far[3]), (b[2], b[3]), total, HALF),)
            sums = new
        _finish(sums, joint, bias, y, parts, counters, tile, share, tokens, columns,
                SHARES, ROWS, HAS_BIAS, WARPS)  # fmt: skip


@gluon.jit
def _finish(
    sums, joint, bias, y, parts, counters, tile, share, tokens, columns,
    SHARES: gl.constexpr, ROWS: gl.constexpr, HAS_BIAS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Add up what the warps have, then the shares, and store it."""
    ALONG: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    ACROSS: gl.constexpr = gl.BlockedLayout([WARPS, 1], [1, 32], [1, WARPS], [1, 0])
    LINE: gl.constexpr = gl.SliceLayout(0, ACROSS)
    for r in gl.static_range(ROWS):
        s = sums[r]
        lane = gl.join(gl.join(s[0], s[2]), gl.join(s[1], s[3])).reshape([WARPS, 128])
        joint.index(r).store(gl.convert_layout(lane, ALONG))
    element = gl.arange(0, 128, LINE)  # register r of lane 4 g + i: output g + r // 2 * 8, row 2 i + r % 2
    n = 16 * tile + element // 16 + element % 4 // 2 * 8
    token = element // 4 % 4 * 2 + element % 2
    size = tokens * columns
    for r in gl.static_range(ROWS):
        total = gl.sum(joint.index(r).load(ACROSS), 0)
        inside = (token + 8 * r < tokens) & (n < columns)
        cell = (token + 8 * r).to(gl.int64) * columns + n
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
            for r in gl.static_range(ROWS):
                inside = (token + 8 * r < tokens) & (n < columns)
                cell = (token + 8 * r).to(gl.int64) * columns + n
                total = gl.zeros([128], gl.float32, LINE)
                for other in gl.static_range(SHARES):
                    at = parts + other * size + cell
                    total += gl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
                if HAS_BIAS:
                    total += gl.load(bias + n, mask=inside, other=0.0).to(gl.float32)
                gl.store(y + cell, total.to(y.dtype.element_ty), mask=inside)


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, config: Configuration) -> None:
    """x (T, K) times the rows of a contiguous weight (N, K) into y (T, N); T at most 64, 16 bits, aligned.

    config: PROGRAMS, SHARES of a sum, DEPTH, num_warps.
    """
    (tokens, width), columns, warps = x.shape, weight.shape[0], config["num_warps"]
    tiles, shares = triton.cdiv(columns, 16), config["SHARES"]
    if tiles > COUNTERS:
        shares = 1
    programs = min(tiles, max(1, config["PROGRAMS"] // shares))
    parts = y if shares == 1 else x.new_empty((shares, tokens, columns), dtype=torch.float32)
    few_rows_kernel[(programs * shares,)](
        x, weight, bias, y, parts, counters(x.device), x.stride(0), tokens, columns, programs,
        K=width, SHARES=shares, ROWS=triton.cdiv(tokens, 8), HAS_BIAS=bias is not None,
        DEPTH=config["DEPTH"], WARPS=warps, num_warps=warps, enable_fp_fusion=True,
        **launch_options(x.device),
    )  # fmt: skip
