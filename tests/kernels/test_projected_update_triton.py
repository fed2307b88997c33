"""dt_proj and the state update in one Triton kernel, in the interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ssm_dist import kernels
from tests.kernels import naive
from tests.kernels.checks import ROUNDING
from tests.kernels.inputs import scan_inputs

pytestmark = pytest.mark.usefixtures("triton_backend")


def inputs(sequences: int, channels: int, rank: int, groups: int, dtype: torch.dtype) -> list[Any]:
    """Arguments of `projected_state_update` without the epsilon; `given` and z are views."""
    x, _, A_log, B, _, D, z, bias, state, offsets, slots = scan_inputs(
        [1] * sequences, channels, 16, groups, dtype
    )
    given = torch.randn(sequences, groups, rank + 2 * B.shape[2] + 3).to(dtype)[..., 3:]
    weight = (torch.randn(channels, rank) / rank**0.5).to(dtype)
    return [x, given, weight, A_log, D, z, bias, state, offsets, slots]


def expected(arguments: list[Any], eps: float | None) -> tuple[Tensor, Tensor]:
    """Output and states in float64, without any rounding between."""
    x, given, weight, A_log, D, z, bias, state, offsets, slots = arguments
    rank = weight.shape[1]
    parts = given.double().split([rank, 16, 16], dim=-1)
    dt, B, C = parts if eps is None else (naive.rms_norm(t, eps) for t in parts)
    weights = weight.double().unflatten(0, (given.shape[1], -1))
    projected = torch.stack([dt[:, g] @ w.T for g, w in enumerate(weights)], 1).flatten(1)
    return naive.selective_scan(x, projected, A_log, B, C, D, z, bias, state, offsets, slots)


@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("sequences", "channels", "rank", "groups"), [(1, 6, 3, 1), (3, 32, 4, 2), (8, 20, 37, 1)]
)
def test_it_rounds_nothing_between(
    sequences: int, channels: int, rank: int, groups: int, dtype: torch.dtype, eps: float | None
) -> None:
    arguments = inputs(sequences, channels, rank, groups, dtype)
    state, slots = arguments[7], arguments[9].long()
    unnamed = torch.ones(len(state), dtype=torch.bool).index_fill(0, slots, False)
    state[unnamed] = torch.nan
    y64, state64 = expected(arguments, eps)
    y = kernels.projected_state_update(*arguments[:8], arguments[9], eps)
    assert y.dtype == dtype and y.is_contiguous()
    assert_close(y.double(), y64, rtol=ROUNDING[dtype]["rtol"] + 1e-5, atol=1e-5)
    assert_close(state[slots].double(), state64[slots], rtol=1e-5, atol=1e-5)
    assert state[unnamed].isnan().all()


@pytest.mark.parametrize(("sequences", "channels", "groups"), [(9, 6, 1), (2, 18, 3), (0, 6, 1)])
def test_separate_kernels_do_what_it_does_not(sequences: int, channels: int, groups: int) -> None:
    """Many sequences, or blocks of channels that would lie in two groups."""
    arguments = inputs(sequences, channels, 3, groups, torch.float32)
    y64, _ = expected(arguments, None)
    y = kernels.projected_state_update(*arguments[:8], arguments[9])
    assert_close(y.double(), y64, rtol=1e-5, atol=1e-5)
