"""What the codecs promise, in float64."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_dist.kernels.codecs import decode_rows, encode_rows, sum_rows

QUANTISED = [("int8", 32), ("int8", 128), ("fp8", 32), ("fp8", 128), ("int4", 32)]
CODECS = [("none", 128), *QUANTISED]

TOP = {"int8": 127.0, "int4": 8.0, "fp8": 448.0}
FLOAT32_ROUNDING = 1 + 2.0**-20
"""Of the scale, its reciprocal and two products."""


def scales(x: Tensor, codec: str, group_size: int) -> Tensor:
    """The scale of every number of x (rows, width)."""
    width = x.shape[1]
    padded = F.pad(x.double().abs(), (0, -width % group_size)).unflatten(1, (-1, group_size))
    amax = padded.amax(-1, keepdim=True).expand_as(padded).flatten(1)[:, :width]
    return (amax / TOP[codec]).clamp(min=torch.finfo(torch.float32).tiny)


def error_bound(x: Tensor, codec: str, group_size: int, least: Tensor | None = None) -> Tensor:
    """The largest error of each number of x (rows, width) after encoding and decoding.

    Half a step: of a uniform grid, or of e4m3 with its 3 bits, whose subnormals are 2 ** -9 apart. int4 ends
    at 7 steps on the side of the smaller numbers. least: where only bounds of the numbers are known, the
    lower ones of their magnitudes, x being the upper ones.
    """
    if codec == "none":
        return x.new_zeros(x.shape, dtype=torch.float64)
    scale = scales(x, codec, group_size)
    half = scale / 2
    if codec == "fp8":
        half = torch.maximum(x.double().abs() / 16, scale / 1024)
    elif codec == "int4":
        step = scale if least is None else scales(least, codec, group_size)
        half = torch.maximum(half, x.double().abs() - 7 * step)
    return half * FLOAT32_ROUNDING + 2.0**-20 * x.double().abs() + 1e-38


def reduction_bound(parts: Tensor, codec: str, group_size: int, dtype: torch.dtype) -> Tensor:
    """The largest error of the quantised sum of parts (ranks, rows, width), rounded to `dtype` at the end."""
    sent = torch.stack([error_bound(part, codec, group_size) for part in parts]).sum(0)
    sent = sent + len(parts) * 2.0**-23 * parts.double().abs().sum(0)
    total = parts.double().sum(0)
    again = error_bound(total.abs() + sent, codec, group_size, (total.abs() - sent).clamp(min=0))
    rounding = torch.finfo(dtype).eps / 2 * (total.abs() + sent + again) + torch.finfo(dtype).tiny
    return sent + again + rounding


def sum_by_codec_ops(parts: Tensor, codec: str, group_size: int) -> Tensor:
    """What all ranks hold of the sum of parts (ranks, rows, width); each owns a stripe of the rows."""
    ranks, rows, width = parts.shape
    layout, stripe = (width, parts.dtype, codec, group_size), -(-rows // ranks)
    sent = torch.stack([encode_rows(part, codec, group_size, rows) for part in parts])
    sums = []
    for rank, first in enumerate(range(0, rows, stripe)):
        own = slice(first, first + stripe)
        sums.append(sum_rows(sent[:, own].contiguous(), *layout, parts[rank, own], rank))
    return torch.cat([decode_rows(total, *layout) for total in sums])
