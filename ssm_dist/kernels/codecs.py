"""Codecs of quantised reductions: rows of numbers to rows of bytes, and sums of them.

A row of `width` numbers becomes `RowLayout.bytes` bytes: the payload, then one float32 scale for each group
of `group_size` neighbours (the last group of a row may be shorter), then padding to 16 bytes. Rows do not
depend on each other, so any stripe of rows is a message. With x a group, amax its largest magnitude and peak
the number that has it:

    none    payload = x as it is; no scales
    int8    scale = amax / 127, payload = round(x / scale)             |error| <= scale / 2
    int4    scale = peak / -8, payload = round(x / scale), at most 7,  |error| <= |scale| / 2, of numbers that
            two a byte, the first low                                  are almost -peak up to twice that
    fp8     scale = amax / 448, payload = e4m3(x / scale)              |error| <= |x| / 16, or scale / 1024

int4 uses all 16 values, and the peak comes back exactly, as in llama.cpp's Q4_0: with scales of amax / 7 demo
models differed from exact ones by a quarter more (mean KL divergence, `benchmarks/reduction_fidelity` at
commit e0e8451). A group that holds NaN or an infinity gets the scale NaN and decodes to NaN everywhere.

With error feedback (as for gradients in Karimireddy et al., arXiv 1901.09847), a message is encoded together
with what encoding dropped of the one before, so that the sum of many messages lacks what one of them does:

    given = x + error, error' = given - decoded(encoded(given))

Parts are decoded in float32, to be added up; sums in the dtype of the message, which the error accounts for.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from ssm_dist.kernels import backend

CodecName = Literal["none", "int8", "fp8", "int4"]

OPS = ("encode_rows", "sum_rows", "decode_rows", "encode_rows_with_feedback", "sum_rows_with_feedback")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What can be encoded."""

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Groups below 127 (448, 8) times this lose precision; reciprocals stay finite."""


@dataclass(frozen=True)
class RowLayout:
    """Where the parts of an encoded row are."""

    payload: int
    """Bytes of it, at the start."""
    scales: int
    """Offset of the float32 scales."""
    groups: int
    """Number of the scales."""
    bytes: int
    """Of the whole row."""


def row_layout(width: int, dtype: torch.dtype, codec: str, group_size: int) -> RowLayout:
    """The layout of a row of `width` numbers of `dtype`. Raises ValueError for what cannot be encoded."""
    if dtype not in DTYPES:
        raise ValueError(f"codec {codec!r} takes float32, bfloat16 or float16, not {dtype}")
    payload = {"none": width * dtype.itemsize, "int8": width, "fp8": width, "int4": -(-width // 2)}[codec]
    groups = 0 if codec == "none" else -(-width // group_size)
    scales = -(-payload // 4) * 4
    return RowLayout(payload, scales, groups, -(-(scales + 4 * groups) // 16) * 16)


def encode_rows(x: Tensor, codec: str, group_size: int, total: int) -> Tensor:
    """x (rows, width) -> (total, bytes) uint8; the rows after those of x hold anything."""
    return backend.implementation("encode_rows")(x, codec, group_size, total)


def decode_rows(encoded: Tensor, width: int, dtype: torch.dtype, codec: str, group_size: int) -> Tensor:
    """encoded (rows, bytes) uint8 -> (rows, width) of `dtype`, rounded to nearest."""
    return backend.implementation("decode_rows")(encoded, width, dtype, codec, group_size)


def sum_rows(
    parts: Tensor, width: int, dtype: torch.dtype, codec: str, group_size: int, own: Tensor | None = None,
    rank: int = 0,
) -> Tensor:  # fmt: skip
    """parts (ranks, rows, bytes) uint8 -> (rows, bytes): the sum, taken in float32 in order, encoded.

    own: (rows, width) of `dtype`, which needs no encoding, in the place of parts[rank].
    """
    return backend.implementation("sum_rows")(parts, width, dtype, codec, group_size, own, rank)


def encode_rows_with_feedback(
    x: Tensor, error: Tensor | None, codec: str, group_size: int, total: int
) -> tuple[Tensor, Tensor]:
    """`encode_rows` of x + error, and the new error, what that drops: (rows, width) contiguous, in x's dtype.

    error: what the call before returned, None for zeros. The codec must not be none.
    """
    assert codec != "none"
    return backend.implementation("encode_rows_with_feedback")(x, error, codec, group_size, total)


def sum_rows_with_feedback(
    parts: Tensor, error: Tensor | None, width: int, dtype: torch.dtype, codec: str, group_size: int,
    own: Tensor | None = None, rank: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sum_rows`, with `error` added to the sum, and the new error: (rows, width) contiguous, of `dtype`.

    error and codec as in `encode_rows_with_feedback`. Errors of rows that were never encoded are undefined.
    """
    assert codec != "none"
    return backend.implementation("sum_rows_with_feedback")(
        parts, error, width, dtype, codec, group_size, own, rank
    )


@backend.register("encode_rows", "reference")
def encode_rows_reference(x: Tensor, codec: str, group_size: int, total: int) -> Tensor:
    """The definition of `encode_rows`, with torchao's quantisation primitives."""
    layout = row_layout(x.shape[1], x.dtype, codec, group_size)
    encoded = torch.zeros(total, layout.bytes, dtype=torch.uint8, device=x.device)
    rows = encoded[: x.shape[0]]
    if codec == "none":
        rows[:, : layout.payload] = x.contiguous().view(torch.uint8)
        return encoded
    payload, scales = _primitives().quantize(_in_groups(x.float(), layout.groups, group_size), codec)
    flat = payload.flatten(1)[:, : x.shape[1]]
    rows[:, : layout.payload] = _packed(flat) if codec == "int4" else flat.view(torch.uint8)
    rows[:, layout.scales : layout.scales + 4 * layout.groups] = scales.view(torch.uint8)
    return encoded


@backend.register("decode_rows", "reference")
def decode_rows_reference(
    encoded: Tensor, width: int, dtype: torch.dtype, codec: str, group_size: int
) -> Tensor:
    """The definition of `decode_rows`."""
    layout = row_layout(width, dtype, codec, group_size)
    payload = encoded[:, : layout.payload].contiguous()
    if codec == "none":
        return payload.view(dtype)
    scales = encoded[:, layout.scales : layout.scales + 4 * layout.groups].contiguous().view(torch.float32)
    flat = _unpacked(payload, width) if codec == "int4" else payload
    values = _primitives().dequantize(_in_groups(flat, layout.groups, group_size), scales, codec)
    return values.flatten(1)[:, :width].to(dtype)


@backend.register("sum_rows", "reference")
def sum_rows_reference(
    parts: Tensor, width: int, dtype: torch.dtype, codec: str, group_size: int, own: Tensor | None = None,
    rank: int = 0,
) -> Tensor:  # fmt: skip
    """The definition of `sum_rows`."""
    total = decoded_sum(parts, width, dtype, codec, group_size, own, rank)
    if codec == "none":
        total = total.to(dtype)
    return encode_rows_reference(total, codec, group_size, len(total))


@backend.register("encode_rows_with_feedback", "reference")
def encode_rows_with_feedback_reference(
    x: Tensor, error: Tensor | None, codec: str, group_size: int, total: int
) -> tuple[Tensor, Tensor]:
    """The definition of `encode_rows_with_feedback`."""
    encoded, left = _fed_back(x.float(), error, codec, group_size, total, decoded_as=torch.float32)
    return encoded, left.to(x.dtype)


@backend.register("sum_rows_with_feedback", "reference")
def sum_rows_with_feedback_reference(
    parts: Tensor, error: Tensor | None, width: int, dtype: torch.dtype, codec: str, group_size: int,
    own: Tensor | None = None, rank: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition of `sum_rows_with_feedback`."""
    total = decoded_sum(parts, width, dtype, codec, group_size, own, rank)
    encoded, left = _fed_back(total, error, codec, group_size, len(total), decoded_as=dtype)
    return encoded, left.to(dtype)


def _fed_back(
    x: Tensor, error: Tensor | None, codec: str, group_size: int, total: int, decoded_as: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x (rows, width) float32 and an error, encoded, and what is missing once that is decoded."""
    given = x if error is None else x + error.float()
    encoded = encode_rows_reference(given, codec, group_size, total)
    kept = decode_rows_reference(encoded[: len(x)], x.shape[1], decoded_as, codec, group_size)
    return encoded, (given - kept.float()).contiguous()


def decoded_sum(
    parts: Tensor, width: int, dtype: torch.dtype, codec: str, group_size: int, own: Tensor | None = None,
    rank: int = 0,
) -> Tensor:  # fmt: skip
    """The sum of parts (ranks, rows, bytes), in order: (rows, width) float32. own, rank: as in `sum_rows`."""
    kind = dtype if codec == "none" else torch.float32
    terms = [
        (decode_rows(part, width, kind, codec, group_size) if own is None or place != rank else own).float()
        for place, part in enumerate(parts)
    ]
    return functools.reduce(torch.add, terms)


def _primitives() -> ModuleType:
    # torchao takes a second to import, and only a quantised reduction needs it
    from ssm_dist.kernels import codec_primitives

    return codec_primitives


def _in_groups(rows: Tensor, groups: int, group_size: int) -> Tensor:
    """(rows, width) -> (rows, groups, group_size), zeros where the last group is short."""
    padded = torch.nn.functional.pad(rows, (0, groups * group_size - rows.shape[1]))
    return padded.unflatten(1, (groups, group_size))


def _packed(values: Tensor) -> Tensor:
    """int8 values of 4 bits, two a byte, the first in the low half; a row of odd length ends with 0."""
    pairs = torch.nn.functional.pad(values, (0, values.shape[1] % 2)).view(torch.uint8).unflatten(1, (-1, 2))
    return (pairs[..., 0] & 15) | (pairs[..., 1] << 4)


def _unpacked(packed: Tensor, width: int) -> Tensor:
    """The inverse of `_packed`, sign-extended."""
    halves = torch.stack([packed << 4, packed], dim=-1).view(torch.int8)
    return (halves >> 4).flatten(1)[:, :width]
