"""in_proj, the convolution's update and x_proj by Triton kernels, in the interpreter."""

import pytest
import torch
from torch.testing import assert_close

from ssm_dist import kernels
from ssm_dist.kernels import triton_linear, tuning
from tests.kernels import naive
from tests.kernels.checks import ROUNDING
from tests.kernels.inputs import conv_inputs

pytestmark = pytest.mark.usefixtures("triton_backend")

WIDTH = 37
"""Of the hidden states."""
TILES = {"BLOCK_N": 16, "BLOCK_K": 16, "AHEAD": 0, "num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("sequences", "channels", "outputs", "heads", "width"),
    [
        (1, 6, 5, 1, 4),
        (3, 32, 12, 2, 3),
        (4, 37, 40, 1, 2),
        (5, 6, 5, 1, 4),
        (19, 18, 5, 3, 4),
        (70, 6, 5, 1, 4),
        (0, 6, 5, 1, 4),
    ],
)
def test_all_outputs_and_the_state_are_right(
    sequences: int, channels: int, outputs: int, heads: int, width: int, biased: bool, dtype: torch.dtype
) -> None:
    """Also for more sequences than one kernel serves; each stage by what the one before it gave."""
    _, taps, conv_bias, state, offsets, slots = conv_inputs([1] * sequences, channels, width, dtype)
    hidden, x_proj = torch.randn(sequences, WIDTH).to(dtype), torch.randn(outputs, channels).to(dtype).T
    weight = torch.randn(channels + 9, WIDTH).to(dtype)
    bias = torch.randn(channels + 9).to(dtype) if biased else None
    packed = kernels.linear(hidden, weight, bias)
    before = state.clone()
    y, z, projected = kernels.projected_conv_update(
        hidden, weight, bias, taps, conv_bias, state, slots, x_proj, heads
    )
    assert torch.equal(z, packed[:, channels:])
    x = packed[:, :channels]
    expected, expected_state = naive.causal_conv(x, taps, conv_bias, before, offsets, slots)
    assert_close(y.double(), expected, **ROUNDING[dtype])
    assert_close(state.double(), expected_state, **ROUNDING[dtype])
    assert (y.dtype, projected.dtype, projected.shape) == (dtype, dtype, (sequences, heads, outputs))
    by_head = y.double().unflatten(1, (heads, -1)), x_proj.double().unflatten(0, (heads, -1))
    exact = torch.einsum("tgc,gcr->tgr", *by_head)
    size = torch.einsum("tgc,gcr->tgr", *(t.abs() for t in by_head))
    bound = (channels + 2) * 2.0**-24 * size + torch.finfo(dtype).eps * exact.abs()
    assert ((projected.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(("sequences", "programs"), [(3, 1), (16, 6), (17, 1000), (64, 30)])
def test_blocks_that_x_and_z_share_on_the_tensor_cores(sequences: int, programs: int) -> None:
    """Also where several programs share a sum: the last of them goes on with the convolution."""
    _, taps, conv_bias, state, offsets, slots = conv_inputs([1] * sequences, 41, 4, torch.bfloat16)
    hidden, weight = torch.randn(sequences, 100).bfloat16(), torch.randn(82, 100).bfloat16()
    before = state.clone()
    config = {**TILES, "BLOCK_T": 16, "PROGRAMS": programs}
    op = f"linear_{triton_linear._padded(sequences)}"
    with tuning.forced(op, config), tuning.forced("linear_4", {}):
        packed = kernels.linear(hidden, weight)
        assert triton_linear.ends_in_conv(hidden, weight, taps)
        y = triton_linear.linear_conv_update(hidden, weight, None, taps, conv_bias, state, slots)
    expected, expected_state = naive.causal_conv(packed[:, :41], taps, conv_bias, before, offsets, slots)
    assert_close(y[:, :41].double(), expected, **ROUNDING[torch.bfloat16])
    assert_close(state.double(), expected_state, **ROUNDING[torch.bfloat16])
    assert torch.equal(y[:, 41:], packed[:, 41:])
