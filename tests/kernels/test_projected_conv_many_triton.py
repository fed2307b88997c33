"""The convolution's update and x_proj of many sequences in one Triton kernel, in the interpreter."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from ssm_dist import kernels
from ssm_dist.kernels import triton_projected_conv_many, tuning
from ssm_dist.kernels.triton_projected_conv_many import projected_conv_updates
from tests.kernels import naive
from tests.kernels.checks import ROUNDING
from tests.kernels.inputs import conv_inputs

pytestmark = pytest.mark.usefixtures("triton_backend")

MANY: tuning.Configuration = {"SEQUENCES": 8, "SHARES": 3, "BLOCK_D": 16, "BLOCK_R": 128, "num_warps": 4}


def inputs(
    sequences: int, channels: int, outputs: int, width: int = 4, dtype: torch.dtype = torch.bfloat16
) -> list[Any]:
    """Arguments but the number of heads, with offsets before the slots, of which four more have a state."""
    x, taps, bias, _, offsets, _ = conv_inputs([1] * sequences, channels, width, dtype)
    state = torch.randn(sequences + 4, width - 1, channels).to(dtype)
    slots = torch.randperm(len(state), dtype=torch.int32)[:sequences]
    return [x, taps, bias, state, offsets, slots, torch.randn(outputs, channels).to(dtype).T]


def check(arguments: list[Any], heads: int) -> None:
    """Outputs off by their own rounding and that of sums in float32, and the slots not named untouched."""
    x, taps, bias, state, offsets, slots, weight = arguments
    unnamed = torch.ones(len(state), dtype=torch.bool).index_fill(0, slots.long(), False)
    state[unnamed] = torch.nan
    expected, expected_state = naive.causal_conv(x, taps, bias, state, offsets, slots)
    assert triton_projected_conv_many.serves(x, taps, weight, heads)
    y, projected = projected_conv_updates(x, taps, bias, state, slots, weight, heads)
    assert (y.dtype, projected.dtype) == (x.dtype, x.dtype)
    assert projected.shape == (len(x), heads, weight.shape[1]) and y.is_contiguous()
    assert_close(y.double(), expected, **ROUNDING[x.dtype])
    assert torch.equal(state[slots.long()].double(), expected_state[slots.long()])
    assert state[unnamed].isnan().all()
    by_head = y.double().unflatten(1, (heads, -1)), weight.double().unflatten(0, (heads, -1))
    exact = torch.einsum("tgc,gcr->tgr", *by_head)
    size = torch.einsum("tgc,gcr->tgr", *(t.abs() for t in by_head))
    bound = (x.shape[1] + 2) * 2.0**-24 * size + torch.finfo(x.dtype).eps * exact.abs()
    assert ((projected.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("sequences", "channels", "outputs", "heads", "width"),
    [(5, 16, 5, 1, 4), (8, 80, 192, 1, 3), (17, 96, 40, 2, 4), (24, 112, 140, 1, 2), (43, 64, 264, 2, 4)],
)
@pytest.mark.parametrize("rows", [8, 16])
def test_both_outputs_and_the_state_are_right(
    rows: int, sequences: int, channels: int, outputs: int, heads: int, width: int, dtype: torch.dtype
) -> None:
    """Blocks of sequences that are not full, shares that end within their chunks, and tiles of columns."""
    with tuning.forced("projected_conv_updates", {**MANY, "SEQUENCES": rows}):
        check(inputs(sequences, channels, outputs, width, dtype), heads)


@pytest.mark.parametrize(
    "config",
    [{"SEQUENCES": 32}, {"BLOCK_D": 32}, {"BLOCK_R": 64}, {"BLOCK_R": 256}, {"SHARES": 1}, {"SHARES": 99}],
    ids=str,
)
def test_other_blocks(config: tuning.Configuration) -> None:
    arguments = inputs(37, 160, 192)
    arguments[2] = None
    with tuning.forced("projected_conv_updates", {**MANY, **config}):
        check(arguments, 1)


def test_registers_that_hold_few_channels_make_more_shares() -> None:
    with tuning.forced("projected_conv_updates", {**MANY, "SEQUENCES": 32, "SHARES": 1, "num_warps": 1}):
        check(inputs(9, 192, 24), 1)


@pytest.mark.parametrize(
    ("sequences", "channels", "heads", "dtype"),
    [
        (6, 32, 1, torch.bfloat16),
        (6, 32, 1, torch.float32),
        (6, 40, 1, torch.bfloat16),
        (6, 48, 2, torch.bfloat16),
        (0, 32, 1, torch.bfloat16),
    ],
    ids=str,
)
def test_it_gives_what_separate_kernels_give(
    sequences: int, channels: int, heads: int, dtype: torch.dtype
) -> None:
    """They also serve numbers of four bytes, channels that do not divide into blocks, and no sequences."""
    _, taps, bias, state, _, slots, x_proj = inputs(sequences, channels, 7, dtype=dtype)
    hidden, weight = torch.randn(sequences, 20).to(dtype), torch.randn(2 * channels, 20).to(dtype)
    again = state.clone()
    expected = kernels.projected_conv_update(hidden, weight, None, taps, bias, state, slots, x_proj, heads)
    with tuning.forced("projected_conv_updates", MANY):
        ours = kernels.projected_conv_update(hidden, weight, None, taps, bias, again, slots, x_proj, heads)
    assert_close(again, state, **ROUNDING[dtype])
    for found, right in zip(ours, expected, strict=True):
        assert_close(found, right, rtol=ROUNDING[dtype]["rtol"], atol=2e-2)


def test_nan_in_a_neighbour_never_leaks() -> None:
    x, taps, bias, state, _, slots, weight = inputs(10, 64, 24)
    x[3], state[slots[3].long()] = torch.nan, torch.nan
    others = torch.arange(10) != 3
    with tuning.forced("projected_conv_updates", MANY):
        y, projected = projected_conv_updates(x, taps, bias, state, slots, weight, 1)
    for t in (y, projected, state[slots.long()]):
        assert t[3].isnan().all() and not t[others].isnan().any()
