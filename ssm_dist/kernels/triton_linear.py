"""Linear layers with few rows: whether `triton_linear_kernels` or `gluon_linear` serves, and its launch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

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


def in_registers(x: Tensor, weight: Tensor, rows: int) -> bool:
    """Whether the ordinary units' programs can hold so many rows of the weight; torch.compile asks, too."""
    warps, most = _vector_configuration(x, weight)["num_warps"], HELD[1 if len(x) == 1 else VECTOR_ROWS]
    return rows * x.shape[1] * weight.element_size() <= most * 32 * warps


def _vector(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, heads: int = 1) -> None:
    (tokens, width), columns = x.shape, weight.shape[0]
    width //= heads
    blocks = vector_blocks(x, weight, heads=heads)
    vector_kernel[(heads * triton.cdiv(columns, blocks["BLOCK_N"]),)](
        x, weight, bias, y, x.stride(0), weight.stride(0), columns,
        K=width, TOKENS=tokens, HEADS=heads, HAS_BIAS=bias is not None, enable_fp_fusion=True,
        **blocks, **launch_options(x.device),
    )  # fmt: skip


def matrix_blocks(x: Tensor, weight: Tensor) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """By the tensor cores' configuration: how many programs, the kernel's numbers, and its constants.

    Programs of PROGRAMS that have no tile of their own share sums.
    """
    (tokens, width), columns = x.shape, weight.shape[0]
    config = dict(_matrix_configuration(x, weight))
    rows = min(config.pop("BLOCK_T", MOST_ROWS), tuning.padded(tokens))
    across, steps = triton.cdiv(columns, config["BLOCK_N"]), triton.cdiv(width, config["BLOCK_K"])
    tiles = triton.cdiv(tokens, rows) * across
    shares = min(max(1, config.pop("PROGRAMS") // tiles), steps) if tiles <= COUNTERS else 1
    span = triton.cdiv(steps, shares) * config["BLOCK_K"]
    shares = triton.cdiv(width, span)
    parts = x.new_empty((shares, tokens, columns) if shares > 1 else 0, dtype=torch.float32)
    numbers = {
        "parts": parts, "counters": counters(x.device), "x_row": x.stride(0), "tokens": tokens,
        "columns": columns, "width": width, "span": span, "shares": shares, "across": across,
    }  # fmt: skip
    constants = {"SHARED": shares > 1, "WHOLE": width % config["BLOCK_K"] == 0, "BLOCK_T": rows, **config}
    return tiles * shares, numbers, constants


def _matrix(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    programs, numbers, constants = matrix_blocks(x, weight)
    matrix_kernel[(programs,)](
        x, weight, bias, y, **numbers, **constants, HAS_BIAS=bias is not None, enable_fp_fusion=True,
        **launch_options(x.device),
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
    op = f"linear_{tuning.padded(rows)}"
    deep = f"{op}_deep"
    return deep if weight.shape[1] > weight.shape[0] and deep in tuning.TABLE else op


def _held_form(x: Tensor, weight: Tensor) -> tuning.Configuration | None:
    """None where the weight is not to be held. Where it is to be and cannot, another kernel serves."""
    return held_form(x, weight) if x.shape[0] > VECTOR_ROWS else None


def _by_vector(x: Tensor, weight: Tensor) -> bool:
    """Whether the ordinary units multiply."""
    return x.shape[0] <= VECTOR_ROWS and bool(_vector_configuration(x, weight))


def served_by(x: Tensor, weight: Tensor) -> Literal["vector", "held", "matrix"] | None:
    """Which kernel is to serve `linear`, unless one that would hold the weight cannot; None: torch's own."""
    if x.dim() != 2 or x.dtype != weight.dtype or x.stride(1) != 1 or not 0 < x.shape[0] <= MOST_ROWS:
        return None
    if not weight.is_contiguous():
        return None
    if _held_form(x, weight) is not None:
        return "held"
    if _by_vector(x, weight):
        return "vector"
    by_tensor_cores = x.element_size() <= 2 and bool(_matrix_configuration(x, weight))
    return "matrix" if by_tensor_cores else None


def held_kernel(x: Tensor, weight: Tensor) -> Callable[..., None] | None:
    """`gluon_linear.few_rows` of x and a weight that it is to hold; None where it is not, or cannot."""
    held = _held_form(x, weight)
    if held is None or x.data_ptr() % 16 or weight.data_ptr() % 16:
        return None
    gluon = gluon_module("gluon_linear", x.device)
    return None if gluon is None else functools.partial(gluon.few_rows, x, weight, held)


@operator("linear", fake=empty_outputs)
def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kernel, y = served_by(x, weight), empty_outputs(x, weight)
    assert kernel is not None
    held = held_kernel(x, weight) if kernel == "held" else None
    with torch.cuda.device_of(x):
        if held is not None:
            held(bias, y)
        elif kernel == "vector":
            _vector(x, weight, bias, y)
        elif _matrix_configuration(x, weight):
            _matrix(x, weight, bias, y)
        else:
            y = F.linear(x, weight, bias)
    return y


@backend.register("linear", "triton")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`ssm_dist.kernels.linear`: by these kernels where they serve, otherwise as torch does it."""
    return F.linear(x, weight, bias) if served_by(x, weight) is None else _few_rows(x, weight, bias)


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
    if heads > 1 and served_by(x, by_output) == "vector":
        return _few_rows_by_head(x, by_output, heads)
    return project_heads_reference(x, weight, heads)
