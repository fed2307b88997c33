"""Triton kernels of linear layers with few rows, bound by reading the weight.

A row, and up to 4 by a small weight, multiply on the ordinary units: a program holds whole rows of the weight
in registers, all asked for before it waits for its input. Otherwise the tensor cores multiply: tiles of the
weight from the left, the rows of x, padded to 16, 32 or 64, from the right. Where the weight has too few
tiles to occupy the GPU, several programs share the sum of one; the last of them adds up what the others have
left, which takes long for many rows, so that these may be dealt out in blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.kernels import backend, tuning
from ssm_dist.kernels.dependent_launch import launch_options, prefetch, start_next, wait_for_inputs
from ssm_dist.kernels.operators import operator
from ssm_dist.kernels.triton_common import factor
from ssm_dist.kernels.triton_shares import COUNTERS, counters, last_to_finish

MOST_ROWS = 64
"""Beyond, torch's product is near the memory's bandwidth or bound by arithmetic."""

VECTOR_ROWS = 4
HELD = {1: 384, 2: 256, 3: 160, 4: 160}
"""Rows -> bytes of the weight in a thread's registers at most: each row takes registers for its sums."""


@triton.jit
def columns_of(row, k, K: tl.constexpr, BLOCK_K: tl.constexpr, START: tl.constexpr):
    """A tile of columns START + k of rows that begin at `row`; zeros past K."""
    if START + BLOCK_K <= K:
        tile = tl.load(row + (START + k))
    else:
        tile = tl.load(row + (START + k), mask=START + k < K, other=0.0)
    return tile


@triton.jit(do_not_specialize=["columns"])
def _vector_kernel(
    x, weight, bias, y, x_row, columns,
    K: tl.constexpr, TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N numbers of each of TOKENS rows. It also fetches the weights AHEAD programs on."""
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    GROUP: tl.constexpr = 16 // TOKENS
    BYTES: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    start_next(PDL)
    program = tl.program_id(0)
    n = program * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row = weight + (tl.minimum(n, columns - 1).to(tl.int64) * K)[:, None]
    tiles = ()
    for c in tl.static_range(CHUNKS):
        tiles += (columns_of(row, k[None, :], K, BLOCK_K, c * BLOCK_K),)
    offset = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)
    if AHEAD > 0 and BLOCK_N * K * BYTES % 16 == 0:
        later = (program + AHEAD) * BLOCK_N
        if later + BLOCK_N <= columns:
            prefetch(weight + later.to(tl.int64) * K + tl.arange(0, 1), BLOCK_N * K * BYTES, PDL)
    wait_for_inputs(PDL)

    # Loaded once for each row of the weight, the inputs are where their factors are: in the same threads.
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
                    at = same_row + t * x_row
                    inputs += (columns_of(at, k[None, :], K, BLOCK_K, (first + i) * BLOCK_K),)
        for i in tl.static_range(GROUP):
            if first + i < CHUNKS:
                factors = tiles[first + i].to(tl.float32)
                added = ()
                for t in tl.static_range(TOKENS):
                    added += (sums[t] + factors * inputs[i * TOKENS + t].to(tl.float32),)
                sums = added
    for t in tl.static_range(TOKENS):
        total = tl.sum(sums[t], 1) + offset
        tl.store(y + t * columns.to(tl.int64) + n, total.to(y.dtype.element_ty), mask=n < columns)


@triton.jit(do_not_specialize=["tokens", "shares", "across"])
def _matrix_kernel(
    x, weight, bias, y, parts, counters, x_row, tokens, columns, width, span, shares, across,
    TRANSPOSED: tl.constexpr, SHARED: tl.constexpr, WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N numbers of BLOCK_T rows, summed over one of `shares` spans of the width.

    `across`: blocks of the columns. Programs are numbered by block of rows, block of columns and share.

    TRANSPOSED: the columns where the weight is a transposed view, (columns, width) of (width, columns); or 0.
    WHOLE: the width consists of whole blocks, and may be prefetched.
    """
    BYTES: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    start_next(PDL)
    tile = tl.program_id(0) // shares
    share = tl.program_id(0) % shares
    begin = share * span
    first = tile % across * BLOCK_N
    n, k = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    t = tile // across * BLOCK_T + tl.arange(0, BLOCK_T)
    row = weight + tl.minimum(n, columns - 1).to(tl.int64) * width
    if AHEAD > 0 and WHOLE:
        if TRANSPOSED > 0:
            later = weight + (begin + k) * TRANSPOSED + first
            prefetch(later, tl.minimum(BLOCK_N, columns - first) * BYTES, PDL)
        else:
            prefetch(row + begin, tl.minimum(AHEAD, width - begin) * BYTES, PDL)
    wait_for_inputs(PDL)

    input_row = x + (tl.minimum(t, tokens - 1) * x_row)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for at in range(begin, tl.minimum(begin + span, width), BLOCK_K):
        if WHOLE:
            right = tl.load(input_row + (at + k)[:, None])
        else:
            right = tl.load(input_row + (at + k)[:, None], mask=(at + k < width)[:, None], other=0.0)
        if TRANSPOSED > 0:
            inside = (n < TRANSPOSED)[:, None] & (at + k < width)[None, :]
            left = tl.load(weight + n[:, None] + ((at + k) * TRANSPOSED)[None, :], mask=inside, other=0.0)
        elif WHOLE:
            left = tl.load(row[:, None] + (at + k)[None, :])
        else:
            left = tl.load(row[:, None] + (at + k)[None, :], mask=(at + k < width)[None, :], other=0.0)
        total = tl.dot(factor(left), factor(right), total)

    sums = tl.trans(total)
    cell = t.to(tl.int64)[:, None] * columns + n[None, :]
    inside = (t < tokens)[:, None] & (n < columns)[None, :]
    last = True
    if SHARED:
        size = tokens.to(tl.int64) * columns
        tl.store(parts + share * size + cell, sums, mask=inside)
        last = last_to_finish(counters + tile, shares)
        if last:
            sums = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
            for other in range(shares):
                sums += tl.load(parts + other * size + cell, mask=inside, other=0.0, cache_modifier=".cg")
    if last:
        if HAS_BIAS:
            sums += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
        tl.store(y + cell, sums.to(y.dtype.element_ty), mask=inside)


def _vector_blocks(config: dict[str, Any], tokens: int, width: int, size: int) -> dict[str, Any]:
    """The configuration with fewer rows where a thread could not hold them, and its columns a chunk.

    A warp takes 512 bytes of a row at once; warps without a row of their own share one.
    """
    rows, warps = config["BLOCK_N"], config["num_warps"]
    while rows > 1 and rows * width * size > HELD[tokens] * 32 * warps:
        rows //= 2
    return {**config, "BLOCK_N": rows, "BLOCK_K": 512 // size * max(1, warps // rows)}


def _vector(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    (tokens, width), columns = x.shape, weight.shape[0]
    blocks = _vector_blocks(_vector_configuration(x, weight), tokens, width, weight.element_size())
    _vector_kernel[(triton.cdiv(columns, blocks["BLOCK_N"]),)](
        x, weight, bias, y, x.stride(0), columns,
        K=width, TOKENS=tokens, HAS_BIAS=bias is not None, enable_fp_fusion=True,
        **blocks, **launch_options(x.device),
    )  # fmt: skip


def _matrix(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    (tokens, width), columns = x.shape, weight.shape[0]
    transposed = not weight.is_contiguous()
    config = dict(_matrix_configuration(x, weight))
    rows = min(config.pop("BLOCK_T", MOST_ROWS), _padded(tokens))
    across, steps = triton.cdiv(columns, config["BLOCK_N"]), triton.cdiv(width, config["BLOCK_K"])
    tiles = triton.cdiv(tokens, rows) * across
    shares = min(max(1, config.pop("PROGRAMS") // tiles), steps) if tiles <= COUNTERS else 1
    span = triton.cdiv(steps, shares) * config["BLOCK_K"]
    shares = triton.cdiv(width, span)
    parts = y if shares == 1 else x.new_empty((shares, tokens, columns), dtype=torch.float32)
    _matrix_kernel[(tiles * shares,)](
        x, weight, bias, y, parts, counters(x.device), x.stride(0), tokens, columns, width, span, shares,
        across, TRANSPOSED=columns if transposed else 0, SHARED=shares > 1,
        WHOLE=width % config["BLOCK_K"] == 0 and (not transposed or columns * x.element_size() % 16 == 0),
        HAS_BIAS=bias is not None, BLOCK_T=rows, enable_fp_fusion=True, **config, **launch_options(x.device),
    )  # fmt: skip


def _padded(tokens: int) -> int:
    return next(rows for rows in (16, 32, 64) if tokens <= rows)


def _matrix_configuration(x: Tensor, weight: Tensor) -> tuning.Configuration:
    """Empty where torch's product is faster."""
    if weight.is_contiguous():
        return tuning.configuration(f"linear_{_padded(x.shape[0])}", weight.numel(), x.device)
    return tuning.configuration("linear_transposed", x.shape[0], x.device)


def _outputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@operator("linear", fake=_outputs)
def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert _serves(x, weight)
    y = _outputs(x, weight, bias)
    with torch.cuda.device_of(x):
        (_vector if _by_vector(x, weight) else _matrix)(x, weight, bias, y)
    return y


def _vector_configuration(x: Tensor, weight: Tensor) -> tuning.Configuration:
    """Empty where the tensor cores' kernel is faster."""
    op = "linear_1" if x.shape[0] == 1 else f"linear_{VECTOR_ROWS}"
    return tuning.configuration(op, weight.numel(), x.device)


def _by_vector(x: Tensor, weight: Tensor) -> bool:
    """Whether the ordinary units multiply."""
    if x.shape[0] > VECTOR_ROWS or not weight.is_contiguous():
        return False
    return bool(_vector_configuration(x, weight))


def _serves(x: Tensor, weight: Tensor) -> bool:
    if x.dim() != 2 or x.dtype != weight.dtype or x.stride(1) != 1 or not 0 < x.shape[0] <= MOST_ROWS:
        return False
    if _by_vector(x, weight):
        return True
    if x.element_size() > 2 or not (weight.is_contiguous() or weight.T.is_contiguous()):
        return False
    return bool(_matrix_configuration(x, weight))


@backend.register("linear", "triton")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`ssm_dist.kernels.linear`: by these kernels where they serve, otherwise as torch does it."""
    return _few_rows(x, weight, bias) if _serves(x, weight) else F.linear(x, weight, bias)
