"""torchao's quantisation primitives as the codecs' definitions use them; the only file that knows torchao.

Its helpers for float8 are private; `constraints.txt` holds the version that this was written for.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ssm_dist.kernels.codecs import SMALLEST_SCALE

# torchao warns of CUDA extensions that were built for another torch; nothing here uses them
_disabled = logging.root.manager.disable
logging.disable(logging.WARNING)
from torchao.quantization.quant_primitives import (  # noqa: E402
    MappingType,
    _choose_scale_float8,
    _dequantize_affine_float8,
    _quantize_affine_float8,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

logging.disable(_disabled)

LARGEST = {"int8": 127, "int4": 8, "fp8": 448}
"""The payload of a group's largest magnitude; of int4 with a minus."""
RANGE = {"int8": (-127, 127), "int4": (-8, 7)}
"""Of payloads."""


def quantize(x: Tensor, codec: str) -> tuple[Tensor, Tensor]:
    """x (rows, groups, size) float32 -> payload of that shape (int8, or float8), scales (rows, groups).

    A group with NaN or an infinity has a payload of zeros and the scale NaN.
    """
    blocks = [1, 1, x.shape[2]]
    scales, zero_points = _scales(x, codec, blocks)
    broken = ~scales.isfinite()
    x, usable = x.masked_fill(broken[..., None], 0.0), scales.masked_fill(broken, 1.0)
    if codec == "fp8":
        payload = _quantize_affine_float8(x, usable[..., None], torch.float8_e4m3fn)
    else:
        payload = quantize_affine(x, blocks, usable, zero_points, torch.int8, *RANGE[codec])
    return payload, scales.masked_fill(broken, torch.nan)


def dequantize(payload: Tensor, scales: Tensor, codec: str) -> Tensor:
    """The inverse of `quantize`: payload (rows, groups, size) bytes, scales (rows, groups) -> float32."""
    if codec == "fp8":
        return _dequantize_affine_float8(payload.view(torch.float8_e4m3fn), scales[..., None])
    blocks = [1, 1, payload.shape[2]]
    return dequantize_affine(payload.view(torch.int8), blocks, scales, None, torch.int8, *RANGE[codec])


def _scales(x: Tensor, codec: str, blocks: list[int]) -> tuple[Tensor, Tensor | None]:
    """Scales (rows, groups), not finite where x is not; and zero points, all 0, for integers."""
    top = LARGEST[codec]
    if codec == "fp8":
        scales = _choose_scale_float8(x, blocks, hp_value_lb=top * SMALLEST_SCALE)
        return scales[..., 0], None
    if codec == "int4":
        lowest, highest = x.aminmax(dim=2)
        scales = torch.where(highest > -lowest, highest, lowest) / -top
        too_small = scales.abs() < SMALLEST_SCALE
        return scales.masked_fill(too_small, SMALLEST_SCALE), torch.zeros_like(scales, dtype=torch.int32)
    return choose_qparams_affine(
        x, MappingType.SYMMETRIC, blocks, torch.int8, -top, top, SMALLEST_SCALE, torch.float32, torch.int32
    )
