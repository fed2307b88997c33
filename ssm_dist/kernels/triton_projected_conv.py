"""The first half of a mixer's decode step: in_proj and the convolution in one Triton kernel, then x_proj."""

from torch import Tensor

from ssm_dist.kernels import backend
from ssm_dist.kernels.convolution import projected_conv_update_reference
from ssm_dist.kernels.linear import project_heads
from ssm_dist.kernels.triton_linear import ends_in_conv, linear_conv_update


@backend.register("projected_conv_update", "triton")
def projected_conv_update(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, taps: Tensor, conv_bias: Tensor | None,
    state: Tensor, slots: Tensor, x_proj: Tensor, heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`ssm_dist.kernels.projected_conv_update`; where torch multiplies by in_proj, by separate kernels."""
    if not ends_in_conv(hidden, weight, taps):
        return projected_conv_update_reference(
            hidden, weight, bias, taps, conv_bias, state, slots, x_proj, heads
        )
    x, z = linear_conv_update(hidden, weight, bias, taps, conv_bias, state, slots).tensor_split(
        [taps.shape[0]], dim=1
    )
    return x, z, project_heads(x, x_proj, heads)
