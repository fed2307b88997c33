"""Linear layers with few rows: whether `triton_linear_kernels` or `gluon_linear` serves, and its launch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ssm_dist.kernels import backend, tuning
from ssm_dist.kernels.dependent_launch import launch_options
from ssm_dist.kernels.gluon_linear_form import held_form
from ssm_dist.kernels.gluon_support import gluon_module
from ssm_dist.kernels.linear import empty_outputs, project_heads_reference
from ssm_dist.kernels.operators import operator
from ssm_dist.kernels.triton_linear_kernels import matrix_kernel, vector_kernel
from ssm_dist.kernels.triton_shares import COUNTERS, counters

MOST_ROWS = 64
"""Beyond, torch's product is near the memory's bandwidth or bound by arithmetic."""

VECTOR_ROWS = 4
HELD = {1: 384, 2: 256, 3: 160, 4: 160}
"""Rows -> bytes of the weight in a thread's registers at most: each row takes registers for its sums."""


def vector_blocks(x: Tensor, weight: Tensor, rows: int | None = None, heads: int = 1) -> dict[str, Any]:
    """The ordinary units' configuration, with fewer rows where a thread could not hold them.

    rows: of the weight a program, in the place of the recorded ones. A warp takes 512 bytes of a row at once;
    warps without a row of their own share one.
    """
    config, size = _vector_configuration(x, weight), weight.element_size()
    tokens, width = len(x), x.shape[1] // heads
    rows, warps = rows or config["BLOCK_N"], config["num_warps"]
    while rows > 1 and rows * width * size > HELD[tokens] * 32 * warps:
        rows //= 2
    return {**config, "BLOCK_N": rows, "BLOCK_K": 512 // size * max(1, warps // rows)}


def _vector(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, heads: int = 1) -> None:
    (tokens, width), columns = x.shape, weight.shape[0]
    width //= heads
    blocks = vector_blocks(x, weight, heads=heads)
    vector_kernel[(heads * triton.cdiv(columns, blocks["BLOCK_N"]),)](
        x, weight, bias, y, x.stride(0), weight.stride(0), columns,
        K=width, TOKENS=tokens, HEADS=heads, HAS_BIAS=bias is not None, enable_fp_fusion=True,
        **blocks, **launch_options(x.device),
    )  # fmt: skip


def _matrix(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    (tokens, width), columns = x.shape, weight.shape[0]
    config = dict(_matrix_configuration(x, weight))
    rows = min(config.pop("BLOCK_T", MOST_ROWS), tuning.padded(tokens))
    across, steps = triton.cdiv(columns, config["BLOCK_N"]), triton.cdiv(width, config["BLOCK_K"])
    tiles = triton.cdiv(tokens, rows) * across
    shares = min(max(1, config.pop("PROGRAMS") // tiles), steps) if tiles <= COUNTERS else 1
    span = triton.cdiv(steps, shares) * config["BLOCK_K"]
    shares = triton.cdiv(width, span)
    parts = y if shares == 1 else x.new_empty((shares, tokens, columns), dtype=torch.float32)
    matrix_kernel[(tiles * shares,)](
        x, weight, bias, y, parts, counters(x.device), x.stride(0), tokens, columns, width, span, shares,
        across, SHARED=shares > 1, WHOLE=width % config["BLOCK_K"] == 0,
        HAS_BIAS=bias is not None, BLOCK_T=rows, enable_fp_fusion=True, **config, **launch_options(x.device),
    )  # fmt: skip


def _vector_configuration(x: Tensor, weight: Tensor) -> tuning.Configuration:
    """Empty where the tensor cores' kernel is faster."""
    return tuning.configuration(vector_op(x.shape[0]), weight.numel(), x.device)


def vector_op(rows: int) -> str:
    """The table's name of the ordinary units' kernel for so many rows."""
    return "linear_1" if rows == 1 else f"linear_{VECTOR_ROWS}"


def _matrix_configuration(x: Tensor, weight: Tensor) -> tuning.Configuration:
    """Empty where torch's product is faster."""
    return tuning.configuration(matrix_op(x.shape[0], weight), weight.numel(), x.device)


def matrix_op(rows: int, weight: Tensor) -> str:
    """The table's name of the tensor cores' kernel for so many rows."""
    padded = tuning.padded(rows)
    deep = padded == MOST_ROWS and weight.shape[1] > weight.shape[0]
    return f"linear_{padded}_deep" if deep else f"linear_{padded}"


def _held_form(x: Tensor, weight: Tensor) -> tuning.Configuration:
    """Empty where the weight is not to be held. Where it is to be and cannot, another kernel serves."""
    return held_form(x, weight) if x.shape[0] > VECTOR_ROWS else {}


def _by_vector(x: Tensor, weight: Tensor) -> bool:
    """Whether the ordinary units multiply."""
    return x.shape[0] <= VECTOR_ROWS and bool(_vector_configuration(x, weight))


def multiplies_by_vector(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` is served by the ordinary units' kernel."""
    return _serves(x, weight) and _by_vector(x, weight)


def _serves(x: Tensor, weight: Tensor) -> bool:
    if x.dim() != 2 or x.dtype != weight.dtype or x.stride(1) != 1 or not 0 < x.shape[0] <= MOST_ROWS:
        return False
    by_tensor_cores = x.element_size() <= 2 and bool(_matrix_configuration(x, weight))
    return weight.is_contiguous() and (
        by_tensor_cores or _by_vector(x, weight) or bool(_held_form(x, weight))
    )


@operator("linear", fake=empty_outputs)
def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert _serves(x, weight)
    held = _held_form(x, weight)
    gluon = gluon_module("gluon_linear", x.device) if held else None
    y = empty_outputs(x, weight)
    with torch.cuda.device_of(x):
        if gluon is not None and not (x.data_ptr() % 16 or weight.data_ptr() % 16):
            gluon.few_rows(x, weight, bias, y, held)
        elif _by_vector(x, weight):
            _vector(x, weight, bias, y)
        elif _matrix_configuration(x, weight):
            _matrix(x, weight, bias, y)
        else:
            y = F.linear(x, weight, bias)
    return y


@backend.register("linear", "triton")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`ssm_dist.kernels.linear`: by these kernels where they serve, otherwise as torch does it."""
    return _few_rows(x, weight, bias) if _serves(x, weight) else F.linear(x, weight, bias)


def _by_head(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    return x.new_empty((x.shape[0], heads, weight.shape[0]))


@operator("project_heads", fake=_by_head)
def _few_rows_by_head(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    y = _by_head(x, weight, heads)
    with torch.cuda.device_of(x):
        _vector(x, weight, None, y, heads=heads)
    return y


@backend.register("project_heads", "triton")
def project_heads(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """`ssm_dist.kernels.linear.project_heads`: few rows of several heads in one launch."""
    by_output = weight.T
    if heads > 1 and _serves(x, by_output) and _by_vector(x, by_output):
        return _few_rows_by_head(x, by_output, heads)
    return project_heads_reference(x, weight, heads)
