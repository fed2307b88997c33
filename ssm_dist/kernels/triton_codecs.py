"""The codecs in Triton: kernels that encode, sum and decode rows; see `triton_codec_tiles`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.kernels import backend
from ssm_dist.kernels.codecs import row_layout
from ssm_dist.kernels.triton_codec_tiles import CHUNK, CODES, ROWS, load_decoded, quantised, store_quantised


@triton.jit(do_not_specialize=["rows"])
def _encode_kernel(
    x, encoded, rows, width, halves, x_row, row_bytes, scales_at,
    CODEC: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: one tile."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * CHUNK
    column = first + tl.arange(0, CHUNK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    value = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    at = encoded + row * row_bytes
    payload, scale = quantised(value, CODEC, GROUP, x.dtype.element_ty)
    store_quantised(at, row < rows, payload, scale, first, width, halves, scales_at, CODEC, GROUP)


@triton.jit(do_not_specialize=["rows"])
def _sum_kernel(
    parts, total, rows, width, halves, row_bytes, scales_at,
    RANKS: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """One program: one tile of the sum, from RANKS tiles."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * CHUNK
    exists, at = row < rows, parts + row * row_bytes
    value = load_decoded(at, exists, first, width, halves, scales_at, CHUNK, CODEC, GROUP, DTYPE)
    for rank in tl.static_range(1, RANKS):
        part = parts + (row + rank * rows) * row_bytes
        value += load_decoded(part, exists, first, width, halves, scales_at, CHUNK, CODEC, GROUP, DTYPE)
    payload, scale = quantised(value, CODEC, GROUP, DTYPE)
    to = total + row * row_bytes
    store_quantised(to, exists, payload, scale, first, width, halves, scales_at, CODEC, GROUP)


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
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, width = x.shape
    layout = row_layout(width, x.dtype, codec, group_size)
    encoded = torch.empty(total, layout.bytes, dtype=torch.uint8, device=x.device)
    with torch.cuda.device_of(x):
        _encode_kernel[tiles(rows, width)](
            x, encoded, rows, width, (width + 1) // 2, x.stride(0), layout.bytes, layout.scales,
            CODEC=CODES[codec], GROUP=group_size, ROWS=ROWS, CHUNK=CHUNK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return encoded


@backend.register("sum_rows", "triton")
def sum_rows(parts: Tensor, width: int, dtype: torch.dtype, codec: str, group_size: int) -> Tensor:
    """`ssm_dist.kernels.codecs.sum_rows`; parts must be contiguous."""
    assert parts.is_contiguous()
    layout = row_layout(width, dtype, codec, group_size)
    total = torch.empty_like(parts[0])
    ranks, rows, _ = parts.shape
    with torch.cuda.device_of(parts):
        _sum_kernel[tiles(rows, width)](
            parts, total, rows, width, (width + 1) // 2, layout.bytes, layout.scales,
            RANKS=ranks, CODEC=CODES[codec], GROUP=group_size, ROWS=ROWS, CHUNK=CHUNK,
            DTYPE=triton_type(dtype), num_warps=4, enable_fp_fusion=False,
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
