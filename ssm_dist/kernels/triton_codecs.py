"""The codecs in Triton: kernels that encode, sum and decode rows; see `triton_codec_tiles`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.kernels import backend
from ssm_dist.kernels.codecs import row_layout
from ssm_dist.kernels.triton_codec_tiles import (
    CHUNK,
    CODES,
    ROWS,
    decoded,
    load_decoded,
    quantised,
    store_quantised,
)


@triton.jit
def _with_error(value, error, cell, inside, HAS_ERROR: tl.constexpr):
    """value, plus the error at `cell` if there is one."""
    if HAS_ERROR:
        value += tl.load(error + cell, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _keep_error(
    left, given, payload, scale, cell, inside, CODEC: tl.constexpr, FEEDBACK: tl.constexpr,
    DECODED: tl.constexpr,
):  # fmt: skip
    """Store what the payload of `given` lacks once it is decoded in that dtype, for FEEDBACK."""
    if FEEDBACK:
        dropped = given - decoded(payload, scale, CODEC).to(DECODED).to(tl.float32)
        tl.store(left + cell, dropped.to(left.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _encode_kernel(
    x, error, encoded, left, rows, width, halves, x_row, row_bytes, scales_at,
    CODEC: tl.constexpr, GROUP: tl.constexpr, HAS_ERROR: tl.constexpr, FEEDBACK: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: one tile. error, left: (rows, width), before and after."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * CHUNK
    column = first + tl.arange(0, CHUNK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    cell = row[:, None] * width + column[None, :]
    value = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    value = _with_error(value, error, cell, inside, HAS_ERROR)
    at = encoded + row * row_bytes
    payload, scale = quantised(value, CODEC, GROUP, x.dtype.element_ty)
    store_quantised(at, row < rows, payload, scale, first, width, halves, scales_at, CODEC, GROUP)
    _keep_error(left, value, payload, scale, cell, inside, CODEC, FEEDBACK, tl.float32)


@triton.jit(do_not_specialize=["rows", "rank"])
def _sum_kernel(
    parts, own, error, total, left, rows, width, halves, own_row, rank, row_bytes, scales_at,
    RANKS: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr, HAS_OWN: tl.constexpr,
    HAS_ERROR: tl.constexpr, FEEDBACK: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """One program: one tile of the sum, from RANKS tiles. error, left: (rows, width), before and after."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * CHUNK
    column = first + tl.arange(0, CHUNK)
    exists = row < rows
    inside = exists[:, None] & (column < width)[None, :]
    cell = row[:, None] * width + column[None, :]
    if HAS_OWN:
        mine = tl.load(own + row[:, None] * own_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    value = tl.zeros((ROWS, CHUNK), tl.float32)
    for place in tl.static_range(RANKS):
        at = parts + (row + place * rows) * row_bytes
        part = load_decoded(at, exists, first, width, halves, scales_at, CHUNK, CODEC, GROUP, DTYPE)
        if HAS_OWN:
            part = tl.where(rank == place, mine, part)
        value = part if place == 0 else value + part
    value = _with_error(value, error, cell, inside, HAS_ERROR)
    payload, scale = quantised(value, CODEC, GROUP, DTYPE)
    to = total + row * row_bytes
    store_quantised(to, exists, payload, scale, first, width, halves, scales_at, CODEC, GROUP)
    _keep_error(left, value, payload, scale, cell, inside, CODEC, FEEDBACK, DTYPE)


@triton.jit(do_not_specialize=["rows"])
def _decode_kernel(
    encoded, x, rows, width, halves, row_bytes, scales_at,
    CODEC: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: one tile."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * CHUNK
    column = first + tl.arange(0, CHUNK)
    at = encoded + row * row_bytes
    DTYPE: tl.constexpr = x.dtype.element_ty
    value = load_decoded(at, row < rows, first, width, halves, scales_at, CHUNK, CODEC, GROUP, DTYPE)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    tl.store(x + row[:, None] * width + column[None, :], value.to(DTYPE), mask=inside)


def triton_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a dtype that can be encoded."""
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def tiles(rows: int, width: int) -> tuple[int, int]:
    """The grid of a kernel of one tile a program."""
    return triton.cdiv(rows, ROWS), triton.cdiv(width, CHUNK)


@backend.register("encode_rows", "triton")
def encode_rows(x: Tensor, codec: str, group_size: int, total: int) -> Tensor:
    """`ssm_dist.kernels.codecs.encode_rows`."""
    return _encode(x, None, None, codec, group_size, total)


@backend.register("encode_rows_with_feedback", "triton")
def encode_rows_with_feedback(
    x: Tensor, error: Tensor | None, codec: str, group_size: int, total: int
) -> tuple[Tensor, Tensor]:
    """`ssm_dist.kernels.codecs.encode_rows_with_feedback`; error must be contiguous."""
    left = x.new_empty(x.shape)
    return _encode(x, error, left, codec, group_size, total), left


def _encode(
    x: Tensor, error: Tensor | None, left: Tensor | None, codec: str, group_size: int, total: int
) -> Tensor:
    """The encoded rows of x, with feedback where `left` is there to fill."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, width = x.shape
    layout = row_layout(width, x.dtype, codec, group_size)
    encoded = torch.empty(total, layout.bytes, dtype=torch.uint8, device=x.device)
    with torch.cuda.device_of(x):
        _encode_kernel[tiles(rows, width)](
            x, error, encoded, left, rows, width, (width + 1) // 2, x.stride(0), layout.bytes, layout.scales,
            CODEC=CODES[codec], GROUP=group_size, **_feedback(error, left),
            ROWS=ROWS, CHUNK=CHUNK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return encoded


def _feedback(error: Tensor | None, left: Tensor | None) -> dict[str, bool]:
    """The constants of a kernel that adds an error and leaves one."""
    assert all(t is None or t.is_contiguous() for t in (error, left))
    return {"HAS_ERROR": error is not None, "FEEDBACK": left is not None}


@backend.register("sum_rows", "triton")
def sum_rows(
    parts: Tensor, width: int, dtype: torch.dtype, codec: str, group_size: int, own: Tensor | None = None,
    rank: int = 0,
) -> Tensor:  # fmt: skip
    """`ssm_dist.kernels.codecs.sum_rows`; parts must be contiguous, and rows of own."""
    return _sum(parts, own, rank, None, None, width, dtype, codec, group_size)


@backend.register("sum_rows_with_feedback", "triton")
def sum_rows_with_feedback(
    parts: Tensor, error: Tensor | None, width: int, dtype: torch.dtype, codec: str, group_size: int,
    own: Tensor | None = None, rank: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ssm_dist.kernels.codecs.sum_rows_with_feedback`; parts, error and rows of own must be contiguous."""
    left = torch.empty(parts.shape[1], width, dtype=dtype, device=parts.device)
    return _sum(parts, own, rank, error, left, width, dtype, codec, group_size), left


def _sum(
    parts: Tensor, own: Tensor | None, rank: int, error: Tensor | None, left: Tensor | None, width: int,
    dtype: torch.dtype, codec: str, group_size: int,
) -> Tensor:  # fmt: skip
    """The encoded sum of parts, with feedback where `left` is there to fill."""
    assert parts.is_contiguous() and (own is None or own.stride(1) == 1)
    layout = row_layout(width, dtype, codec, group_size)
    total = torch.empty_like(parts[0])
    ranks, rows, _ = parts.shape
    with torch.cuda.device_of(parts):
        _sum_kernel[tiles(rows, width)](
            parts, own, error, total, left, rows, width, (width + 1) // 2,
            0 if own is None else own.stride(0), rank, layout.bytes, layout.scales,
            RANKS=ranks, CODEC=CODES[codec], GROUP=group_size, HAS_OWN=own is not None,
            **_feedback(error, left), ROWS=ROWS, CHUNK=CHUNK, DTYPE=triton_type(dtype), num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return total


@backend.register("decode_rows", "triton")
def decode_rows(encoded: Tensor, width: int, dtype: torch.dtype, codec: str, group_size: int) -> Tensor:
    """`ssm_dist.kernels.codecs.decode_rows`; encoded must be contiguous."""
    assert encoded.is_contiguous()
    layout = row_layout(width, dtype, codec, group_size)
    x = torch.empty(len(encoded), width, dtype=dtype, device=encoded.device)
    with torch.cuda.device_of(encoded):
        _decode_kernel[tiles(*x.shape)](
            encoded, x, len(encoded), width, (width + 1) // 2, layout.bytes, layout.scales,
            CODEC=CODES[codec], GROUP=group_size, ROWS=ROWS, CHUNK=CHUNK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return x
