"""The normalisations against their formula in float64 (`naive`)."""

import pytest
import torch
from torch.testing import assert_close

from ssm_dist import kernels
from tests.kernels import naive

pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.mark.parametrize("given", ["branch", "residual", "both"])
@pytest.mark.parametrize(("tokens", "width"), [(0, 4), (1, 1), (3, 37), (5, 64)])
def test_add_rms_norm_normalises_the_sum_and_returns_it(given: str, tokens: int, width: int) -> None:
    branch = torch.randn(tokens, width, dtype=torch.float64) if given != "residual" else None
    residual = torch.randn(tokens, width, dtype=torch.float64) if given != "branch" else None
    weight = torch.randn(width, dtype=torch.float64)
    y, total = kernels.add_rms_norm(branch, residual, weight, 1e-5)
    expected = sum(t for t in (branch, residual) if t is not None)
    assert_close(total, expected)
    assert_close(y, naive.rms_norm(total, 1e-5) * weight)


def test_add_rms_norm_keeps_the_residual_in_float32() -> None:
    branch, residual = torch.randn(3, 37).bfloat16(), torch.randn(3, 37)
    weight = torch.randn(37).bfloat16()
    y, total = kernels.add_rms_norm(branch, residual, weight, 1e-5)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(total, residual + branch)
    assert_close(y.double(), naive.rms_norm(total, 1e-5) * weight.double(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (4, 2, 37)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)]
)
def test_rms_normalize_has_no_weight(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    x = (10 * torch.randn(shape)).to(dtype)
    y = kernels.rms_normalize(x, 1e-6)
    assert y.dtype == dtype
    assert_close(y.double(), naive.rms_norm(x, 1e-6), rtol=tolerance, atol=tolerance)


def test_a_norm_of_zeros_is_zero() -> None:
    assert not kernels.rms_normalize(torch.zeros(2, 5), 1e-6).any()
