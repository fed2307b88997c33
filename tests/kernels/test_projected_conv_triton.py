"""The convolution's update and x_proj in one Triton kernel, in the interpreter."""

import pytest
import torch
from torch.testing import assert_close

from ssm_dist import kernels
from ssm_dist.kernels import tuning
from tests.kernels import naive
from tests.kernels.checks import ROUNDING
from tests.kernels.inputs import conv_inputs

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("sequences", "channels", "outputs", "heads", "width"),
    [
        (1, 6, 5, 1, 4),
        (3, 32, 12, 2, 3),
        (4, 37, 40, 1, 2),
        (5, 6, 5, 1, 4),
        (2, 18, 5, 3, 4),
        (0, 6, 5, 1, 4),
    ],
)
def test_both_outputs_and_the_state_are_right(
    sequences: int, channels: int, outputs: int, heads: int, width: int, dtype: torch.dtype
) -> None:
    """Also for more sequences, or heads that blocks would cross, which separate kernels serve."""
    x, taps, bias, state, offsets, slots = conv_inputs([1] * sequences, channels, width, dtype)
    weight = torch.randn(channels, outputs).to(dtype)
    expected, expected_state = naive.causal_conv(x, taps, bias, state, offsets, slots)
    with tuning.forced("projected_conv_update", {"BLOCK_D": 16, "BLOCK_P": 2, "num_warps": 4}):
        y, projected = kernels.projected_conv_update(x, taps, bias, state, slots, weight, heads)
    assert (y.dtype, projected.dtype, projected.shape) == (dtype, dtype, (sequences, heads, outputs))
    assert_close(y.double(), expected, **ROUNDING[dtype])
    assert_close(state.double(), expected_state, **ROUNDING[dtype])
    by_head = y.double().unflatten(1, (heads, -1)), weight.double().unflatten(0, (heads, -1))
    exact = torch.einsum("tgc,gcr->tgr", *by_head)
    size = torch.einsum("tgc,gcr->tgr", *(t.abs() for t in by_head))
    bound = (channels + 2) * 2.0**-24 * size + torch.finfo(dtype).eps * exact.abs()
    assert ((projected.double() - exact).abs() <= bound).all()
