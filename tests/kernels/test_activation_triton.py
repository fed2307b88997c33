"""The gated activation: the Triton kernel in the interpreter, and the definition."""

import math

import pytest
import torch
from torch.testing import assert_close

from ssm_dist import kernels
from ssm_dist.kernels import backend
from tests.kernels.checks import ROUNDING

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CANCELLED = 1e-5
"""1 + erf(x) of float32 is off by 1.2e-7 at most, times |x| / 2 and |up|, which are below 6 and 12 here."""


def by_hand(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """x * Phi(x) * up, number by number."""
    phi = gate.double().clone().apply_(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))
    return gate.double() * phi * up.double()


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(0, 4), (1, 1), (3, 37), (2, 1030)])
def test_gated_gelu_is_its_definition(dtype: torch.dtype, rows: int, width: int) -> None:
    gate, up = (3 * torch.randn(2, rows, width + 7)).to(dtype)[..., 7:]
    y = kernels.gated_gelu(gate, up)
    assert y.dtype == dtype and y.is_contiguous()
    assert_close(y.double(), by_hand(gate, up), rtol=ROUNDING[dtype]["rtol"], atol=CANCELLED)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_the_definition_rounds_once(dtype: torch.dtype) -> None:
    gate, up = (3 * torch.randn(2, 5, 40)).to(dtype)
    with backend.using("reference", "cpu"):
        y = kernels.gated_gelu(gate, up)
    exact = dtype == torch.float64
    bound = {"rtol": 1e-12 if exact else ROUNDING[dtype]["rtol"], "atol": 1e-13 if exact else CANCELLED}
    assert_close(y.double(), by_hand(gate, up), **bound)
