"""The Triton state update in the interpreter."""

import pytest
import torch

from ssm_dist import kernels
from ssm_dist.kernels import tuning
from tests.kernels import naive
from tests.kernels.checks import check_stateful
from tests.kernels.inputs import scan_inputs

pytestmark = pytest.mark.usefixtures("triton_backend")

SMALL = {"SEQUENCES": 2, "BLOCK_D": 4, "num_warps": 1}
STATE = 8


@pytest.mark.parametrize(
    ("sequences", "channels", "states", "groups"),
    [
        (1, 1, 16, 1),
        (5, 6, 16, 1),
        (3, 12, 8, 3),
        (2, 8, 32, 2),
        (3, 5, 64, 1),
        (12, 7, 16, 1),
        (0, 4, 16, 1),
    ],
)
def test_update_is_its_definition(sequences: int, channels: int, states: int, groups: int) -> None:
    inputs = scan_inputs([1] * sequences, channels, states, groups, torch.float32)
    check_stateful(kernels.selective_state_update, naive.selective_scan, inputs, update=True)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_update_in_small_blocks_that_may_hold_channels_of_two_groups(groups: int) -> None:
    inputs = scan_inputs([1] * 5, 18, 8, groups, torch.float32)
    with tuning.forced("selective_state_update", SMALL):
        check_stateful(kernels.selective_state_update, naive.selective_scan, inputs, update=True)


@pytest.mark.parametrize("activation", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_update_rounds_once(activation: torch.dtype, state: torch.dtype) -> None:
    inputs = scan_inputs([1] * 4, 6, 16, 1, activation)
    inputs[STATE] = inputs[STATE].to(state)
    check_stateful(kernels.selective_state_update, naive.selective_scan, inputs, update=True)


@pytest.mark.parametrize("dt", [-60.0, -12.0, 0.0, 12.0, 60.0, 1e4])
def test_update_keeps_its_precision_for_any_step(dt: float) -> None:
    """Also where softplus(dt) is so small that 1 + exp(dt) rounds to 1."""
    inputs = scan_inputs([1, 1], 6, 16, 1, torch.float32)
    inputs[1] = torch.full_like(inputs[1], dt)
    inputs[STATE] = torch.zeros_like(inputs[STATE])
    expected = naive.selective_scan(*inputs)[1]
    kernels.selective_state_update(*inputs[:-2], inputs[-1])
    slots = inputs[-1].long()
    torch.testing.assert_close(inputs[STATE][slots].double(), expected[slots], rtol=2e-6, atol=1e-35)


def test_nan_in_a_neighbour_never_leaks() -> None:
    inputs = scan_inputs([1, 1, 1], 6, 16, 1, torch.float32)
    for i in (0, 1, 3, 4, 6):
        inputs[i][1] = torch.nan
    inputs[STATE][inputs[-1][1].long()] = torch.nan
    with tuning.forced("selective_state_update", SMALL):
        y = kernels.selective_state_update(*inputs[:-2], inputs[-1])
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()
    assert not inputs[STATE][inputs[-1][[0, 2]].long()].isnan().any()
