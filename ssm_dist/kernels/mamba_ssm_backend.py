"""The decode step's ops by mamba-ssm and causal-conv1d, where these packages are installed.

Their other kernels do not serve: mamba-ssm's scan starts from a zero state, which cannot be known without
asking the device, and causal-conv1d takes packed sequences or states to continue from, but not both.
"""

import torch
from causal_conv1d import causal_conv1d_update
from mamba_ssm.ops.triton.selective_state_update import selective_state_update as mamba_ssm_update
from torch import Tensor

from ssm_dist.kernels import backend
from ssm_dist.kernels.operators import operator


@backend.register("causal_conv_update", "mamba_ssm")
@operator("causal_conv_update_mamba_ssm", mutates=("state",))
def causal_conv_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor
) -> Tensor:
    """`ssm_dist.kernels.causal_conv_update`; the state must have the dtype of x, and bias that of weight."""
    y = causal_conv1d_update(x, state.transpose(1, 2), weight, bias, "silu", conv_state_indices=slots)
    return y.contiguous()


@backend.register("selective_state_update", "mamba_ssm")
@operator("selective_state_update_mamba_ssm", mutates=("state",))
def selective_state_update(
    x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    state: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    """`ssm_dist.kernels.selective_state_update`; each group of channels is a head of mamba-ssm's."""
    heads = (B.shape[1], -1)
    x_heads, dt_heads, z_heads = (t.unflatten(1, heads) for t in (x, dt, z))
    D_heads, bias_heads = D.unflatten(0, heads), dt_bias.unflatten(0, heads)
    y = mamba_ssm_update(
        state.unflatten(1, heads), x_heads, dt_heads, -torch.exp(A_log.float()).unflatten(0, heads), B, C,
        D_heads, z=z_heads, dt_bias=bias_heads, dt_softplus=True, state_batch_indices=slots,
    )  # fmt: skip
    return y.flatten(1).contiguous()
