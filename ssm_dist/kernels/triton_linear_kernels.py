"""Triton kernels of linear layers with few rows, bound by reading the weight.

A row, and up to 4 by a small weight, multiply on the ordinary units: a program holds whole rows of the weight
in registers, all asked for before it waits for its input. Otherwise the tensor cores multiply: tiles of the
weight from the left, the rows of x, padded to 16, 32 or 64, from the right. Where the weight has too few
tiles to occupy the GPU, several programs share the sum of one; the last of them adds up what the others have
left, which takes long for many rows, so that these may be dealt out in blocks.
"""

import triton
import triton.language as tl

from ssm_dist.kernels.dependent_launch import prefetch, start_next, wait_for_inputs
from ssm_dist.kernels.triton_common import factor
from ssm_dist.kernels.triton_shares import last_to_finish


@triton.jit
def columns_of(row, k, K: tl.constexpr, BLOCK_K: tl.constexpr, START: tl.constexpr):
    """A tile of columns START + k of rows that begin at `row`; zeros past K."""
    if START + BLOCK_K <= K:
        tile = tl.load(row + (START + k))
    else:
        tile = tl.load(row + (START + k), mask=START + k < K, other=0.0)
    return tile


@triton.jit
def weight_tiles(row, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The rows of a weight that begin at `row` (BLOCK_N, 1), in chunks of BLOCK_K columns."""
    k = tl.arange(0, BLOCK_K)[None, :]
    tiles = ()
    for c in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        tiles += (columns_of(row, k, K, BLOCK_K, c * BLOCK_K),)
    return tiles


@triton.jit
def vector_sums(
    tiles, x, x_row, K: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """What `weight_tiles` returned times TOKENS rows of x: for each of them (BLOCK_N,) float32.

    Loaded once for each row of the weight, the inputs are where their factors are: in the same threads.
    """
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    GROUP: tl.constexpr = 16 // TOKENS
    k = tl.arange(0, BLOCK_K)[None, :]
    same_row = x + tl.zeros((BLOCK_N, 1), tl.int32)
    sums = ()
    for _ in tl.static_range(TOKENS):
        sums += (tl.zeros((BLOCK_N, BLOCK_K), tl.float32),)
    for first in tl.static_range(0, CHUNKS, GROUP):
        # The inputs of several chunks are asked for together: each wait for one would be added.
        inputs = ()
        for i in tl.static_range(GROUP):
            for t in tl.static_range(TOKENS):
                if first + i < CHUNKS:
                    inputs += (columns_of(same_row + t * x_row, k, K, BLOCK_K, (first + i) * BLOCK_K),)
        for i in tl.static_range(GROUP):
            if first + i < CHUNKS:
                factors = tiles[first + i].to(tl.float32)
                added = ()
                for t in tl.static_range(TOKENS):
                    added += (sums[t] + factors * inputs[i * TOKENS + t].to(tl.float32),)
                sums = added
    totals = ()
    for t in tl.static_range(TOKENS):
        totals += (tl.sum(sums[t], 1),)
    return totals


@triton.jit(do_not_specialize=["columns"])
def vector_kernel(
    x, weight, bias, y, x_row, weight_row, columns,
    K: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N numbers of a head of each of TOKENS rows.

    It also fetches the weights AHEAD programs on. Head h is what columns h * K ... of x and the weight make.
    """
    BYTES: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    start_next(PDL)
    blocks = tl.cdiv(columns, BLOCK_N)
    program, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    n = program * BLOCK_N + tl.arange(0, BLOCK_N)
    x += head * K
    weight += head * K
    row = weight + (tl.minimum(n, columns - 1).to(tl.int64) * weight_row)[:, None]
    tiles = weight_tiles(row, K, BLOCK_K)
    offset = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)
    if AHEAD > 0 and HEADS == 1 and BLOCK_N * K * BYTES % 16 == 0:
        later = (program + AHEAD) * BLOCK_N
        if later + BLOCK_N <= columns:
            prefetch(weight + later.to(tl.int64) * K + tl.arange(0, 1), BLOCK_N * K * BYTES, PDL)
    wait_for_inputs(PDL)

    totals = vector_sums(tiles, x, x_row, K, TOKENS, BLOCK_N, BLOCK_K)
    for t in tl.static_range(TOKENS):
        at = y + (t * HEADS + head) * columns.to(tl.int64) + n
        tl.store(at, (totals[t] + offset).to(y.dtype.element_ty), mask=n < columns)


@triton.jit
def matrix_tile(
    weight, columns, width, span, shares, across, PDL: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """What a program works on: its tile, its share of that and the column where this begins, rows, columns.

    Programs are numbered by block of rows, block of columns (`across` of them) and share. Last, pointers to
    the tile's BLOCK_N rows of the weight, of which some is prefetched.
    """
    tile = tl.program_id(0) // shares
    share = tl.program_id(0) % shares
    begin = share * span
    n = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tile // across * BLOCK_T + tl.arange(0, BLOCK_T)
    row = weight + tl.minimum(n, columns - 1).to(tl.int64) * width
    if AHEAD > 0 and WHOLE:
        BYTES: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
        prefetch(row + begin, tl.minimum(AHEAD, width - begin) * BYTES, PDL)
    return tile, share, begin, t, n, row


@triton.jit
def matrix_sums(
    row, x, bias, parts, counter, x_row, t, n, tokens, columns, width, begin, span, share, shares,
    SHARED: tl.constexpr, WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The rows t of x times the rows n of the weight (`matrix_tile`): (BLOCK_T, BLOCK_N) float32.

    Summed over a span of the width from `begin` on; with SHARED, the last of the programs that share a sum
    has it. Returns it, and whether this program has.

    WHOLE: the width consists of whole blocks.
    """
    k = tl.arange(0, BLOCK_K)
    # Rows of padding are not read: all programs would ask for the same few addresses at once.
    real = (t < tokens)[None, :]
    input_row = x + (t * x_row)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for at in range(begin, tl.minimum(begin + span, width), BLOCK_K):
        if WHOLE:
            right = tl.load(input_row + (at + k)[:, None], mask=real, other=0.0)
            left = tl.load(row[:, None] + (at + k)[None, :])
        else:
            right = tl.load(input_row + (at + k)[:, None], mask=real & (at + k < width)[:, None], other=0.0)
            left = tl.load(row[:, None] + (at + k)[None, :], mask=(at + k < width)[None, :], other=0.0)
        total = tl.dot(factor(left), factor(right), total)

    sums = tl.trans(total)
    last = True
    if SHARED:
        cell = t.to(tl.int64)[:, None] * columns + n[None, :]
        inside = (t < tokens)[:, None] & (n < columns)[None, :]
        size = tokens.to(tl.int64) * columns
        tl.store(parts + share * size + cell, sums, mask=inside)
        last = last_to_finish(counter, shares)
        if last:
            sums = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
            for other in range(shares):
                sums += tl.load(parts + other * size + cell, mask=inside, other=0.0, cache_modifier=".cg")
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    return sums, last


@triton.jit(do_not_specialize=["tokens", "shares", "across"])
def matrix_kernel(
    x, weight, bias, y, parts, counters, x_row, tokens, columns, width, span, shares, across,
    SHARED: tl.constexpr, WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N numbers of BLOCK_T rows, summed over one of `shares` spans of the width."""
    start_next(PDL)
    tile, share, begin, t, n, row = matrix_tile(
        weight, columns, width, span, shares, across, PDL, WHOLE, BLOCK_T, BLOCK_N, AHEAD
    )
    wait_for_inputs(PDL)

    sums, last = matrix_sums(
        row, x, bias, parts, counters + tile, x_row, t, n, tokens, columns, width, begin, span, share, shares,
        SHARED, WHOLE, HAS_BIAS, BLOCK_T, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if last:
        cell = t.to(tl.int64)[:, None] * columns + n[None, :]
        inside = (t < tokens)[:, None] & (n < columns)[None, :]
        tl.store(y + cell, sums.to(y.dtype.element_ty), mask=inside)
