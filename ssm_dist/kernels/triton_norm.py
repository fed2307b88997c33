"""Triton kernels of the RMS normalisations. Bound by memory for long prompts, by latency while decoding."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.kernels import backend, tuning
from ssm_dist.kernels.dependent_launch import launch_options, start_next, wait_for_inputs
from ssm_dist.kernels.operators import operator


@triton.jit
def _add_rms_norm_kernel(
    branch, residual, weight, appended, y, total, branch_row, residual_row, appended_row, width, more, eps,
    HAS_BRANCH: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_MORE: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: one row. The sum is stored only where there was something to add or to widen."""
    if EARLY:
        start_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_MORE:
        within = column < more
        gain_of_more = tl.load(weight + width + column, mask=within, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    value = tl.zeros((BLOCK,), tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + row * residual_row + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        value += tl.load(branch + row * branch_row + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + row * width + column, value, mask=inside)
    y += row * (width + more) + column
    squares = value * value
    if HAS_MORE:
        others = tl.load(appended + row * appended_row + column, mask=within, other=0.0).to(tl.float32)
        squares += others * others
    scale = tl.rsqrt(tl.sum(squares, 0) / (width + more) + eps)
    tl.store(y, (value * scale * gain).to(y.dtype.element_ty), mask=inside)
    if HAS_MORE:
        tl.store(y + width, (others * scale * gain_of_more).to(y.dtype.element_ty), mask=within)


@triton.jit
def _rms_normalize_kernel(
    x, y, rows, inner, outer_stride, inner_stride, width, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows; row r of x is at (r // inner) * outer_stride + (r % inner) * inner_stride."""
    start_next(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    begin = (row // inner).to(tl.int64) * outer_stride + (row % inner) * inner_stride
    value = tl.load(x + begin[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
    at = y + (row.to(tl.int64) * width)[:, None] + column[None, :]
    tl.store(at, (value * scale[:, None]).to(y.dtype.element_ty), mask=inside)


def _launch(
    branch: Tensor | None, residual: Tensor | None, weight: Tensor, eps: float, appended: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the kernel; returns y and, where there is a branch, the stored sum."""
    given = branch if residual is None else residual
    assert given is not None and all(t is None or t.stride(-1) == 1 for t in (branch, residual, appended))
    (rows, width), more = given.shape, 0 if appended is None else appended.shape[1]
    assert len(weight) == width + more
    y = given.new_empty((rows, width + more), dtype=weight.dtype)
    total = y if branch is None else given.new_empty(given.shape, dtype=torch.float32)
    if rows:
        config = tuning.configuration("add_rms_norm", rows, given.device)
        with torch.cuda.device_of(given):
            _add_rms_norm_kernel[(rows,)](
                branch, residual, weight, appended, y, total,
                *(0 if t is None else t.stride(0) for t in (branch, residual, appended)), width, more, eps,
                HAS_BRANCH=branch is not None, HAS_RESIDUAL=residual is not None,
                HAS_MORE=appended is not None, BLOCK=triton.next_power_of_2(max(width, more)),
                enable_fp_fusion=True, **config,
                **launch_options(given.device),
            )  # fmt: skip
    return y, total


def _normalised_and_sum(
    branch: Tensor, residual: Tensor | None, weight: Tensor, eps: float, appended: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _normalised(branch, weight, eps), branch.new_empty(branch.shape, dtype=torch.float32)


def _normalised(residual: Tensor, weight: Tensor, eps: float, appended: Tensor | None = None) -> Tensor:
    return residual.new_empty((residual.shape[0], weight.shape[0]), dtype=weight.dtype)


@operator("add_rms_norm", fake=_normalised_and_sum)
def _add_and_norm(
    branch: Tensor, residual: Tensor | None, weight: Tensor, eps: float, appended: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _launch(branch, residual, weight, eps, appended)


@operator("rms_norm", fake=_normalised)
def _norm(residual: Tensor, weight: Tensor, eps: float, appended: Tensor | None = None) -> Tensor:
    return _launch(None, residual, weight, eps, appended)[0]


@backend.register("add_rms_norm", "triton")
def add_rms_norm(
    branch: Tensor | None, residual: Tensor | None, weight: Tensor, eps: float,
    appended: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ssm_dist.kernels.add_rms_norm`; rows must be contiguous."""
    if branch is not None:
        return _add_and_norm(branch, residual, weight, eps, appended)
    assert residual is not None, "nothing to normalise"
    return _norm(residual, weight, eps, appended), residual.to(torch.float32)


@backend.register("rms_normalize", "triton")
@operator("rms_normalize")
def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """`ssm_dist.kernels.rms_normalize` for (T, n) or (T, G, n); the last axis must be contiguous."""
    assert x.dim() in (2, 3) and x.stride(-1) == 1
    width, inner = x.shape[-1], x.shape[1] if x.dim() == 3 else 1
    rows = x.shape[0] * inner
    y = x.new_empty(x.shape)
    block = triton.next_power_of_2(width)
    per_program = max(1, 1024 // block)
    if rows:
        with torch.cuda.device_of(x):
            _rms_normalize_kernel[(triton.cdiv(rows, per_program),)](
                x, y, rows, inner, x.stride(0), x.stride(-2), width, eps,
                ROWS=per_program, BLOCK=block, num_warps=4, enable_fp_fusion=True,
                **launch_options(x.device),
            )  # fmt: skip
    return y
