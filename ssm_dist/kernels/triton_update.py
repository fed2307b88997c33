"""Triton kernel of the selective state update, one token a sequence. Bound by moving the state."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.kernels import backend, tuning
from ssm_dist.kernels.dependent_launch import launch_options, start_next, wait_for_inputs
from ssm_dist.kernels.operators import operator
from ssm_dist.kernels.triton_common import LOG2_E, exp2, only_if, silu, softplus


@triton.jit
def _of_group(pointer, row, group_stride, group, n, here, ONE_GROUP: tl.constexpr):
    """B or C of a tile of channels as float32: (1, N) where it lies in one group, else (channels, N)."""
    if ONE_GROUP:
        values = tl.load(pointer + row + group * group_stride + n)[None, :]
    else:
        values = tl.load(
            pointer + row + (group * group_stride)[:, None] + n[None, :], mask=here[:, None], other=0.0
        )
    return values.to(tl.float32)


@triton.jit
def _state_update_kernel(
    x, dt, A_log, B, C, D, z, dt_bias, state, slots, y,
    x_row, dt_row, z_row, B_row, B_group, C_row, C_group, state_slot, sequences, channels, group_channels,
    N: tl.constexpr, ONE_GROUP: tl.constexpr, SEQUENCES: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: one token of SEQUENCES sequences, BLOCK_D channels, whose A, D and bias are read once."""
    start_next(PDL)
    blocks = tl.cdiv(channels, BLOCK_D)
    program = tl.program_id(0)
    corner = (program % blocks) * BLOCK_D
    channel = corner + tl.arange(0, BLOCK_D)
    inside = channel < channels
    n = tl.arange(0, N)
    cell = channel[:, None] * N + n[None, :]
    group = corner // group_channels if ONE_GROUP else channel // group_channels
    first = (program // blocks) * SEQUENCES
    A = tl.load(A_log + cell, mask=inside[:, None], other=0.0).to(tl.float32)
    skip = tl.load(D + channel, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(dt_bias + channel, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)

    # Every load comes before the first store, which no later load could overtake; what needs a slot comes
    # last, since loads are issued in order and would wait for it.
    slot_of = ()
    for i in tl.static_range(SEQUENCES):
        slot_of += (tl.load(slots + first + i, mask=first + i < sequences, other=0),)
    steps, Bs, Cs = (), (), ()
    for i in tl.static_range(SEQUENCES):
        s = tl.minimum(first + i, sequences - 1).to(tl.int64)
        here = channel < only_if(first + i < sequences, channels)
        steps += ((
            tl.load(x + s * x_row + channel, mask=here, other=0.0),
            tl.load(dt + s * dt_row + channel, mask=here, other=0.0),
            tl.load(z + s * z_row + channel, mask=here, other=0.0),
        ),)  # fmt: skip
        Bs += (_of_group(B, s * B_row, B_group, group, n, here, ONE_GROUP),)
        Cs += (_of_group(C, s * C_row, C_group, group, n, here, ONE_GROUP),)
    cells, states = (), ()
    for i in tl.static_range(SEQUENCES):
        here = channel < only_if(first + i < sequences, channels)
        cells += (state + slot_of[i].to(tl.int64) * state_slot + cell,)
        states += (tl.load(cells[i], mask=here[:, None], other=0.0),)
    A = -tl.exp(A) * LOG2_E
    for i in tl.static_range(SEQUENCES):
        here = channel < only_if(first + i < sequences, channels)
        u, step, gate = steps[i]
        u = u.to(tl.float32)
        step = softplus(step.to(tl.float32) + bias)
        new = exp2(step[:, None] * A) * states[i].to(tl.float32) + (step * u)[:, None] * Bs[i]
        tl.store(cells[i], new.to(state.dtype.element_ty), mask=here[:, None])
        total = (tl.sum(new * Cs[i], 1) + skip * u) * silu(gate.to(tl.float32))
        tl.store(y + (first + i).to(tl.int64) * channels + channel, total.to(y.dtype.element_ty), mask=here)


@backend.register("selective_state_update", "triton")
@operator("selective_state_update", mutates=("state",))
def selective_state_update(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    state: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    """`ssm_dist.kernels.selective_state_update`; last dimensions, A_log and each slot must be contiguous."""
    (sequences, channels), states, groups = x.shape, A_log.shape[1], B.shape[1]
    assert states & (states - 1) == 0, f"the Triton state update serves powers of two of states, not {states}"
    assert all(t.stride(-1) == 1 for t in (x, dt, z, B, C))
    assert A_log.is_contiguous() and state.stride()[1:] == (states, 1)
    y = x.new_empty(x.shape)
    config = tuning.configuration("selective_state_update", sequences * channels * states, x.device)
    block = config["BLOCK_D"]
    programs = triton.cdiv(sequences, config["SEQUENCES"]) * triton.cdiv(channels, block)
    if sequences:
        with torch.cuda.device_of(x):
            _state_update_kernel[(programs,)](
                x, dt, A_log, B, C, D, z, dt_bias, state, slots, y,
                x.stride(0), dt.stride(0), z.stride(0), B.stride(0), B.stride(1), C.stride(0), C.stride(1),
                state.stride(0), sequences, channels, channels // groups,
                N=states, ONE_GROUP=groups == 1 or (channels // groups) % block == 0,
                enable_fp_fusion=True, **config, **launch_options(x.device),
            )  # fmt: skip
    return y
