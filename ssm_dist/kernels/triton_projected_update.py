"""Triton kernel of dt_proj and the state update together, for few sequences: one launch instead of two.

Every sequence reads dt_proj's weight again, from the L2 cache. With many, blocks of sequences read it, in
`triton_projected_update_many`, where the tuning table asks for that, and otherwise separate kernels serve.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.kernels import backend, triton_projected_update_many, tuning
from ssm_dist.kernels.dependent_launch import launch_options, start_next, wait_for_inputs
from ssm_dist.kernels.operators import operator
from ssm_dist.kernels.scan import projected_state_update_reference
from ssm_dist.kernels.triton_common import LOG2_E, exp2, silu, softplus


@triton.jit
def _over_rms(v, width, eps, RMS: tl.constexpr):
    """What the numbers of v, some of `width` and zeros, have to be multiplied by: 1 without RMS."""
    scale = 1.0
    if RMS:
        scale = tl.rsqrt(tl.sum(v * v) / width + eps)
    return scale


@triton.jit
def _projected_update_kernel(
    x, given, weight, A_log, D, z, dt_bias, state, slots, y,
    x_row, z_row, given_row, given_group, state_slot, channels, group_channels, eps,
    RANK: tl.constexpr, N: tl.constexpr, RMS: tl.constexpr, PDL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: one token of a sequence, BLOCK_D channels of a group."""
    start_next(PDL)
    blocks = tl.cdiv(channels, BLOCK_D)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    corner = (tl.program_id(0) % blocks) * BLOCK_D
    channel = corner + tl.arange(0, BLOCK_D)
    inside = channel < channels
    n, r = tl.arange(0, N), tl.arange(0, BLOCK_R)
    cell = channel[:, None] * N + n[None, :]
    factors = tl.load(
        weight + channel[:, None] * RANK + r[None, :], mask=inside[:, None] & (r < RANK)[None, :], other=0.0
    )
    A = tl.load(A_log + cell, mask=inside[:, None], other=0.0).to(tl.float32)
    skip = tl.load(D + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(dt_bias + channel, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)

    slot = tl.load(slots + sequence).to(tl.int64)
    group = given + sequence * given_row + (corner // group_channels) * given_group
    low = tl.load(group + r, mask=r < RANK, other=0.0).to(tl.float32)
    B = tl.load(group + RANK + n).to(tl.float32)
    C = tl.load(group + RANK + N + n).to(tl.float32)
    u = tl.load(x + sequence * x_row + channel, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z + sequence * z_row + channel, mask=inside, other=0.0).to(tl.float32)
    cells = state + slot * state_slot + cell
    before = tl.load(cells, mask=inside[:, None], other=0.0).to(tl.float32)

    low *= _over_rms(low, RANK, eps, RMS)
    B *= _over_rms(B, N, eps, RMS)
    C *= _over_rms(C, N, eps, RMS)
    step = softplus(tl.sum(factors.to(tl.float32) * low[None, :], 1) + bias)
    new = exp2(step[:, None] * (-tl.exp(A) * LOG2_E)) * before + (step * u)[:, None] * B[None, :]
    tl.store(cells, new.to(state.dtype.element_ty), mask=inside[:, None])
    total = (tl.sum(new * C[None, :], 1) + skip * u) * silu(gate)
    tl.store(y + sequence * channels + channel, total.to(y.dtype.element_ty), mask=inside)


@operator("projected_state_update", mutates=("state",))
def _joined(
    x: Tensor, given: Tensor, weight: Tensor, A_log: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    state: Tensor, slots: Tensor, rms_eps: float | None,
) -> Tensor:  # fmt: skip
    (sequences, channels), (_, groups, _), rank = x.shape, given.shape, weight.shape[1]
    config = tuning.configuration("projected_state_update", sequences, x.device)
    if "SEQUENCES" in config:
        return triton_projected_update_many.launch(
            x, given, weight, A_log, D, z, dt_bias, state, slots, rms_eps, config
        )
    y = x.new_empty(x.shape)
    with torch.cuda.device_of(x):
        _projected_update_kernel[(sequences * triton.cdiv(channels, config["BLOCK_D"]),)](
            x, given, weight, A_log, D, z, dt_bias, state, slots, y,
            x.stride(0), z.stride(0), given.stride(0), given.stride(1), state.stride(0), channels,
            channels // groups, rms_eps or 0.0,
            RANK=rank, N=A_log.shape[1], RMS=rms_eps is not None, BLOCK_R=triton.next_power_of_2(rank),
            enable_fp_fusion=True, **config, **launch_options(x.device),
        )  # fmt: skip
    return y


def _serves(x: Tensor, given: Tensor, weight: Tensor, states: int) -> bool:
    config, groups = tuning.configuration("projected_state_update", x.shape[0], x.device), given.shape[1]
    if not config or not x.shape[0] or states & (states - 1):
        return False
    if "SEQUENCES" in config and not triton_projected_update_many.serves(x, given, weight):
        return False
    return groups == 1 or x.shape[1] // groups % config["BLOCK_D"] == 0


@backend.register("projected_state_update", "triton")
def projected_state_update(
    x: Tensor, given: Tensor, weight: Tensor, A_log: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    state: Tensor, slots: Tensor, rms_eps: float | None,
) -> Tensor:  # fmt: skip
    """`ssm_dist.kernels.projected_state_update`; where no kernel serves these sizes, by separate ones."""
    if not _serves(x, given, weight, A_log.shape[1]):
        return projected_state_update_reference(x, given, weight, A_log, D, z, dt_bias, state, slots, rms_eps)
    assert all(t.stride(-1) == 1 for t in (x, z, given)) and weight.is_contiguous()
    assert A_log.is_contiguous() and state.stride()[1:] == (A_log.shape[1], 1)
    return _joined(x, given, weight, A_log, D, z, dt_bias, state, slots, rms_eps)
