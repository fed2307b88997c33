"""dt_proj and the state update in one Triton kernel, in the interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ssm_dist import kernels
from ssm_dist.kernels import tuning
from tests.kernels import naive
from tests.kernels.checks import ROUNDING
from tests.kernels.inputs import projected_update_inputs

pytestmark = pytest.mark.usefixtures("triton_backend")


MANY: tuning.Configuration = {"SEQUENCES": 16, "BLOCK_D": 16, "num_warps": 4}
"""Whatever their number, by the kernel for many sequences."""


def expected(arguments: list[Any], eps: float | None) -> tuple[Tensor, Tensor]:
    """Output and states in float64, without any rounding between."""
    x, given, weight, A_log, D, z, bias, state, offsets, slots = arguments
    rank, states = weight.shape[1], A_log.shape[1]
    parts = given.double().split([rank, states, states], dim=-1)
    dt, B, C = parts if eps is None else (naive.rms_norm(t, eps) for t in parts)
    weights = weight.double().unflatten(0, (given.shape[1], -1))
    projected = torch.stack([dt[:, g] @ w.T for g, w in enumerate(weights)], 1).flatten(1)
    return naive.selective_scan(x, projected, A_log, B, C, D, z, bias, state, offsets, slots)


def check(arguments: list[Any], eps: float | None) -> None:
    """Output off by its own rounding only, states by theirs, and the slots not named untouched."""
    state, slots = arguments[7], arguments[9].long()
    unnamed = torch.ones(len(state), dtype=torch.bool).index_fill(0, slots, False)
    state[unnamed] = torch.nan
    y64, state64 = expected(arguments, eps)
    y = kernels.projected_state_update(*arguments[:8], arguments[9], eps)
    assert y.dtype == arguments[0].dtype and y.is_contiguous()
    assert_close(y.double(), y64, rtol=ROUNDING[y.dtype]["rtol"] + 1e-5, atol=1e-5)
    rounding = 0 if state.dtype == torch.float32 else ROUNDING[state.dtype]["rtol"]
    assert_close(state[slots].double(), state64[slots], rtol=rounding + 1e-5, atol=1e-5)
    assert state[unnamed].isnan().all()


@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("sequences", "channels", "rank", "groups"), [(1, 6, 3, 1), (3, 32, 4, 2), (8, 20, 37, 1)]
)
def test_it_rounds_nothing_between(
    sequences: int, channels: int, rank: int, groups: int, dtype: torch.dtype, eps: float | None
) -> None:
    check(projected_update_inputs(sequences, channels, rank, groups, dtype), eps)


@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("sequences", "channels", "rank", "groups", "states"),
    [(1, 6, 3, 1, 16), (9, 32, 16, 2, 16), (16, 20, 37, 1, 8), (17, 48, 40, 1, 16), (40, 64, 32, 2, 8)],
)
def test_the_tensor_cores_round_nothing_between(
    sequences: int, channels: int, rank: int, groups: int, states: int, dtype: torch.dtype, eps: float | None
) -> None:
    with tuning.forced("projected_state_update", MANY):
        check(projected_update_inputs(sequences, channels, rank, groups, dtype, states), eps)


@pytest.mark.parametrize("config", [{"BLOCK_D": 32}, {"SEQUENCES": 32}], ids=str)
def test_larger_blocks_and_states_of_two_bytes(config: tuning.Configuration) -> None:
    arguments = projected_update_inputs(35, 40, 24, 1, torch.bfloat16)
    arguments[7] = arguments[7].bfloat16()
    with tuning.forced("projected_state_update", {**MANY, **config}):
        check(arguments, None)


@pytest.mark.parametrize(("sequences", "channels", "groups"), [(9, 6, 1), (2, 18, 3), (0, 6, 1)])
def test_separate_kernels_do_what_it_does_not(sequences: int, channels: int, groups: int) -> None:
    """Many sequences, or blocks of channels that would lie in two groups."""
    arguments = projected_update_inputs(sequences, channels, 3, groups, torch.float32)
    y64, _ = expected(arguments, None)
    y = kernels.projected_state_update(*arguments[:8], arguments[9])
    assert_close(y.double(), y64, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "groups"), [(torch.float32, 1), (torch.bfloat16, 3)], ids=str)
def test_separate_kernels_do_what_the_tensor_cores_do_not(dtype: torch.dtype, groups: int) -> None:
    """Numbers of four bytes, or blocks of channels that would lie in two groups."""
    arguments = projected_update_inputs(17, 18, 3, groups, dtype)
    again = [*arguments[:7], arguments[7].clone(), arguments[9]]
    y = kernels.projected_state_update(*arguments[:8], arguments[9])
    with tuning.forced("projected_state_update", MANY):
        assert torch.equal(kernels.projected_state_update(*again), y)
