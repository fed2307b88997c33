"""Triton kernel of the gated activation. Bound by memory for long prompts, by latency while decoding."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.kernels import backend
from ssm_dist.kernels.dependent_launch import launch_options, wait_for_inputs
from ssm_dist.kernels.operators import operator

BLOCK = 1024
"""Numbers of a program: 16 bytes a thread, of sixteen bits."""
SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit(do_not_specialize=["blocks"])
def _gated_gelu_kernel(
    gate, up, y, gate_row, up_row, width, blocks, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """One program: BLOCK numbers of one row.

    The next kernel starts at its end. Started at once, programs of down_proj would wait among those of
    up_proj, more of them on some multiprocessors than on others.
    """
    wait_for_inputs(PDL)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    value = g * 0.5 * (1.0 + tl.erf(g * SQRT_HALF)) * u
    tl.store(y + row * width + column, value.to(y.dtype.element_ty), mask=inside)


@backend.register("gated_gelu", "triton")
@operator("gated_gelu")
def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """`ssm_dist.kernels.gated_gelu`; rows must be contiguous."""
    assert gate.shape == up.shape and gate.dtype == up.dtype != torch.float64
    assert gate.stride(-1) == up.stride(-1) == 1
    (rows, width), y = gate.shape, gate.new_empty(gate.shape)
    blocks = triton.cdiv(width, BLOCK)
    if rows:
        with torch.cuda.device_of(gate):
            _gated_gelu_kernel[(rows * blocks,)](
                gate, up, y, gate.stride(0), up.stride(0), width, blocks, BLOCK=BLOCK,
                num_warps=4, enable_fp_fusion=True, **launch_options(gate.device),
            )  # fmt: skip
    return y
