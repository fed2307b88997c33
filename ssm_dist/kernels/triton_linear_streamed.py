"""Triton's linear layer of up to 64 rows with the weight dealt out evenly, however its tiles divide.

A step multiplies all rows by BLOCK_K columns of a tile, which is BLOCK_N rows of the weight. Of as many tiles
as there are programs, or a multiple, each is one program's. The steps of those that remain are dealt out in
spans, of which a tile takes several; the last to finish of a tile adds up what all of them have left. A
program begins with its span, and all its steps are one loop, which loads ahead across the ends of tiles: so
what the end of a tile has to wait for passes while the next weights are under way.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ssm_dist.kernels import tuning
from ssm_dist.kernels.dependent_launch import launch_options, prefetch, start_next, wait_for_inputs
from ssm_dist.kernels.triton_common import factor
from ssm_dist.kernels.triton_shares import counters, last_to_finish


@triton.jit
def _place(i, begin, mine, steps, dealt):
    """The tile and the step within it of a program's i-th step, `mine` of which begin at `begin`."""
    at = tl.where(i < mine, begin + i, i - mine)
    tile = at // steps
    own = dealt + tl.program_id(0) + tile * tl.num_programs(0)
    return tl.where(i < mine, tile, own), at % steps


@triton.jit
def _finish(
    sums, bias, y, tile, t, tokens, columns, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Store rows t of a tile of the product, (BLOCK_N, t) in float32."""
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[:, None]
    inside = (t < tokens)[:, None] & (n < columns)[None, :]
    tl.store(y + (t * columns)[:, None] + n[None, :], tl.trans(sums.to(y.dtype.element_ty)), mask=inside)


@triton.jit
def _finish_shared(
    part, shares, bias, y, tile, tokens, columns,
    HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Store a tile of the product, the sum of `shares` blocks (BLOCK_N, BLOCK_T) from `part` on.

    In so many rows at once that a thread has registers for four blocks under way.
    """
    AT_ONCE: tl.constexpr = min(BLOCK_T, max(8, 32 * THREADS // BLOCK_N))
    row, cell = tl.arange(0, BLOCK_N), tl.arange(0, AT_ONCE)
    for first in tl.static_range(0, BLOCK_T, AT_ONCE):
        cells = part + (first + row[:, None] * BLOCK_T + cell[None, :])
        sums = tl.zeros((BLOCK_N, AT_ONCE), tl.float32)
        for share in range(0, shares, 4):
            loaded = ()
            for i in tl.static_range(4):
                at = cells + (share + i) * (BLOCK_N * BLOCK_T)
                loaded += (tl.load(at, mask=share + i < shares, other=0.0, cache_modifier=".cg"),)
            for i in tl.static_range(4):
                sums += loaded[i]
        _finish(sums, bias, y, tile, first + cell, tokens, columns, HAS_BIAS, BLOCK_N)


@triton.jit(do_not_specialize=["tokens", "steps", "dealt", "span", "own", "most"])
def _streamed_kernel(
    x, weight, x_tiles, weight_tiles, bias, y, parts, counters, x_row, tokens, columns, width,
    steps, dealt, span, own, most,
    TMA: tl.constexpr, WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
    num_warps: tl.constexpr,
):  # fmt: skip
    """One program: `span` of the steps of the `dealt` first tiles, then `own` tiles of `steps` steps.

    TMA: by tensor descriptors, `x_tiles` and `weight_tiles`. WHOLE: the width consists of whole blocks, and
    may be prefetched. `most`: programs of a dealt tile at most, each of which has a block in `parts`.
    """
    BYTES: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    start_next(PDL)
    program = tl.program_id(0)
    begin = program * span
    mine = tl.maximum(tl.minimum(span, dealt * steps - begin), 0)
    count = mine + own * steps
    row, k, t = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_T)
    if AHEAD > 0 and WHOLE and count > 0:
        tile, step = _place(0, begin, mine, steps, dealt)
        first = tl.minimum(tile * BLOCK_N + row, columns - 1).to(tl.int64) * width + step * BLOCK_K
        prefetch(weight + first, tl.minimum(AHEAD, width - step * BLOCK_K) * BYTES, PDL)
    wait_for_inputs(PDL)

    input_row = x + (tl.minimum(t, tokens - 1) * x_row)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for i in tl.range(0, count):
        tile, step = _place(i, begin, mine, steps, dealt)
        at = step * BLOCK_K
        if TMA:
            left = weight_tiles.load([tile * BLOCK_N, at])
            right = x_tiles.load([0, at]).T
        else:
            first = weight + tl.minimum(tile * BLOCK_N + row, columns - 1).to(tl.int64) * width
            if WHOLE:
                left = tl.load(first[:, None] + (at + k)[None, :])
                right = tl.load(input_row + (at + k)[:, None])
            else:
                left = tl.load(first[:, None] + (at + k)[None, :], mask=(at + k < width)[None, :], other=0.0)
                right = tl.load(input_row + (at + k)[:, None], mask=(at + k < width)[:, None], other=0.0)
        if step == 0:
            total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        total = tl.dot(factor(left), factor(right), total)

        if (step == steps - 1) | (i == mine - 1):
            first_program = tile * steps // span
            shares = (tile * steps + steps - 1) // span - first_program + 1
            if (i < mine) & (shares > 1):
                cell = row[:, None] * BLOCK_T + t[None, :]
                part = parts + tile * most * (BLOCK_N * BLOCK_T)
                tl.store(part + (program - first_program) * (BLOCK_N * BLOCK_T) + cell, total)
                if last_to_finish(counters + tile, shares):
                    _finish_shared(
                        part, shares, bias, y, tile, tokens, columns,
                        HAS_BIAS, BLOCK_T, BLOCK_N, 32 * num_warps,
                    )  # fmt: skip
            else:
                _finish(total, bias, y, tile, t, tokens, columns, HAS_BIAS, BLOCK_N)


def streamed(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, rows: int, config: tuning.Configuration
) -> None:
    """y = x weight^T + bias. x (T, K) with T <= `rows`, 16, 32 or 64; weight (N, K) contiguous, y (T, N)."""
    (tokens, width), columns = x.shape, weight.shape[0]
    steps, tiles = triton.cdiv(width, config["BLOCK_K"]), triton.cdiv(columns, config["BLOCK_N"])
    own, dealt = divmod(tiles, config["PROGRAMS"])
    span = max(1, triton.cdiv(dealt * steps, config["PROGRAMS"]))
    most = triton.cdiv(steps, span) + 1
    parts = x.new_empty((dealt * most, config["BLOCK_N"], rows), dtype=torch.float32)
    blocks: dict[str, Any] = {k: v for k, v in config.items() if k != "PROGRAMS"}
    blocks["TMA"] = bool(config["TMA"]) and _described(x) and _described(weight)
    tiled: tuple[Any, Any] = (x, weight)
    if blocks["TMA"]:
        tiled = (
            TensorDescriptor.from_tensor(x, [rows, config["BLOCK_K"]]),
            TensorDescriptor.from_tensor(weight, [config["BLOCK_N"], config["BLOCK_K"]]),
        )
    _streamed_kernel[(config["PROGRAMS"],)](
        x, weight, *tiled, bias, y, parts, counters(x.device), x.stride(0), tokens, columns, width,
        steps, dealt, span, own, most,
        WHOLE=width % config["BLOCK_K"] == 0, HAS_BIAS=bias is not None, BLOCK_T=rows,
        enable_fp_fusion=True, **blocks, **launch_options(x.device),
    )  # fmt: skip


def _described(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can describe it: rows begin at multiples of 16 bytes."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0
