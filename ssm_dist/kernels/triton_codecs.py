"""The codecs in Triton, with the bits of their definitions on a GPU.

What that takes: torch divides by a number on a CPU, and multiplies by its reciprocal on a GPU; no fused
multiply-add between a product and the sum or rounding after it (`enable_fp_fusion=False`); true divisions.
The tile functions serve the kernel of long messages too; a tile is ROWS rows x CHUNK columns, whole groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.errors import UserError
from ssm_dist.kernels import backend
from ssm_dist.kernels.codecs import row_layout
from ssm_dist.kernels.triton_common import INTERPRETED

CODES = {"none": 0, "int8": 1, "fp8": 2, "int4": 3}
"""The codecs as kernels know them."""

NONE, INT8, FP8, INT4 = (tl.constexpr(code) for code in CODES.values())

ROWS, CHUNK = 4, 512
"""Of a tile: a row a warp, 16 numbers a thread."""

SMALLEST_SCALE = tl.constexpr(torch.finfo(torch.float32).tiny)
FIRST_INFINITE = tl.constexpr(0x7F800000)
"""Magnitudes of float32 are ordered as their bits; those from here on are infinity and NaN."""

ROUNDER = tl.constexpr(1.5 * 2**23)
"""Added and taken away again, it rounds numbers below 2 ** 22 to the nearest integer, ties to even."""


@triton.jit
def over(v, NUMBER: tl.constexpr):
    """v / NUMBER as torch computes it on the device."""
    return v / NUMBER if INTERPRETED else v * (1.0 / NUMBER)


@triton.jit
def on_e4m3_grid(v):
    """v, below 464, rounded to the nearest e4m3; for the interpreter, whose conversion loses carries."""
    bits, size = v.to(tl.int32, bitcast=True), tl.abs(v)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0x7FF00000
    below = ((size + ROUNDER / 512) - ROUNDER / 512).to(tl.int32, bitcast=True)
    return (tl.where(size < 0.015625, below, normal) | (bits & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def quantised(x, CODEC: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr):
    """x (ROWS, CHUNK) float32 -> payload of that shape (int32; float8 for fp8), scales (ROWS, CHUNK / GROUP).

    As `codec_primitives.quantize`; with codec none, x in DTYPE, and nothing to use as scales.
    """
    if CODEC == NONE:
        payload, scale = x.to(DTYPE), x
    else:
        groups = tl.reshape(x, (x.shape[0], x.shape[1] // GROUP, GROUP))
        largest = tl.max(groups.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2)
        finite = largest < FIRST_INFINITE
        amax = tl.where(finite, largest, 0).to(tl.float32, bitcast=True)
        groups = tl.where(finite[:, :, None], groups, 0.0)
        if CODEC == FP8:
            step = over(tl.maximum(amax, 448.0 * SMALLEST_SCALE), 448.0)
            scaled = tl.div_rn(groups, tl.broadcast_to(step[:, :, None], groups.shape))
            limited = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
            coded = (on_e4m3_grid(limited) if INTERPRETED else limited).to(tl.float8e4nv)
        else:
            TOP: tl.constexpr = 127.0 if CODEC == INT8 else 7.0
            step = tl.maximum(over(amax, TOP), SMALLEST_SCALE)
            scaled = groups * tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step)[:, :, None]
            rounded = (scaled + ROUNDER) - ROUNDER
            coded = tl.minimum(tl.maximum(rounded, -TOP), TOP).to(tl.int32)
        payload, scale = tl.reshape(coded, x.shape), tl.where(finite, step, float("nan"))
    return payload, scale


@triton.jit
def decoded(payload, scale, CODEC: tl.constexpr, GROUP: tl.constexpr):
    """What others decode of a payload (ROWS, CHUNK) and its scales, bit for bit: (ROWS, CHUNK) float32."""
    x = payload.to(tl.float32)
    if CODEC != NONE:
        groups = tl.reshape(x, (x.shape[0], x.shape[1] // GROUP, GROUP)) * scale[:, :, None]
        x = tl.reshape(groups, x.shape)
    return x


@triton.jit
def store_quantised(
    at, rows, payload, scale, first, width, halves, scales_at, CODEC: tl.constexpr, GROUP: tl.constexpr
):
    """Store what `quantised` made of the columns from `first` on into the rows that begin at `at` (ROWS,).

    rows (ROWS,): which rows exist; width: of a row; halves: (width + 1) // 2; scales_at: offset of scales.
    With codec none, payload holds the numbers as they are, and there is no scale.
    """
    column = first + tl.arange(0, payload.shape[1])
    inside = rows[:, None] & (column < width)[None, :]
    if CODEC == NONE:
        typed = at.to(tl.pointer_type(payload.dtype))
        tl.store(typed[:, None] + column[None, :], payload, mask=inside)
    else:
        group = first // GROUP + tl.arange(0, scale.shape[1])
        has_group = rows[:, None] & (group * GROUP < width)[None, :]
        scales = (at + scales_at).to(tl.pointer_type(tl.float32))
        tl.store(scales[:, None] + group[None, :], scale, mask=has_group)
        if CODEC == INT4:
            low, high = tl.split(tl.reshape(payload, (payload.shape[0], payload.shape[1] // 2, 2)))
            pair = first // 2 + tl.arange(0, payload.shape[1] // 2)
            both = ((low & 15) | (high << 4)).to(tl.uint8)
            tl.store(at[:, None] + pair[None, :], both, mask=rows[:, None] & (pair < halves)[None, :])
        elif CODEC == FP8:
            tl.store(at[:, None] + column[None, :], payload.to(tl.uint8, bitcast=True), mask=inside)
        else:
            tl.store(at[:, None] + column[None, :], payload.to(tl.uint8), mask=inside)


@triton.jit
def load_decoded(
    at, rows, first, width, halves, scales_at,
    CHUNK: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The inverse of `store_quantised`: (ROWS, CHUNK) float32, 0 outside."""
    column = first + tl.arange(0, CHUNK)
    inside = rows[:, None] & (column < width)[None, :]
    if CODEC == NONE:
        typed = at.to(tl.pointer_type(DTYPE))
        payload = tl.load(typed[:, None] + column[None, :], mask=inside, other=0.0)
        scale = payload
    else:
        group = first // GROUP + tl.arange(0, CHUNK // GROUP)
        has_group = rows[:, None] & (group * GROUP < width)[None, :]
        scales = (at + scales_at).to(tl.pointer_type(tl.float32))
        scale = tl.load(scales[:, None] + group[None, :], mask=has_group, other=0.0)
        if CODEC == INT4:
            pair = first // 2 + tl.arange(0, CHUNK // 2)
            within = rows[:, None] & (pair < halves)[None, :]
            both = tl.load(at[:, None] + pair[None, :], mask=within, other=0).to(tl.int32)
            payload = tl.reshape(tl.join((both << 28) >> 28, (both << 24) >> 28), (at.shape[0], CHUNK))
        else:
            raw = tl.load(at[:, None] + column[None, :], mask=inside, other=0)
            KIND: tl.constexpr = tl.float8e4nv if CODEC == FP8 else tl.int8
            payload = raw.to(KIND, bitcast=True)
    return decoded(payload, scale, CODEC, GROUP)


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


def require_codec(codec: str, device: torch.device) -> None:
    """Raise UserError where a GPU lacks the conversions of a codec."""
    if codec == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(
            f"codec fp8 (e4m3) needs a GPU of compute capability 8.9 or more, and "
            f"{torch.cuda.get_device_name(device)} is older; choose int8"
        )


def tiles(rows: int, width: int) -> tuple[int, int]:
    """The grid of a kernel of one tile a program."""
    return triton.cdiv(rows, ROWS), triton.cdiv(width, CHUNK)


@backend.register("encode_rows", "triton")
def encode_rows(x: Tensor, codec: str, group_size: int, total: int) -> Tensor:
    """`ssm_dist.kernels.codecs.encode_rows`."""
    require_codec(codec, x.device)
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
