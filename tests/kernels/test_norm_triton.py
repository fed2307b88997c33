"""The Triton normalisations in the interpreter."""

import pytest
import torch
from torch.testing import assert_close

from ssm_dist import kernels
from ssm_dist.kernels import backend
from tests.kernels import naive
from tests.kernels.checks import ROUNDING

pytestmark = pytest.mark.usefixtures("triton_backend")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", ["branch", "residual", "both"])
@pytest.mark.parametrize(("tokens", "width"), [(0, 4), (1, 1), (3, 37), (2, 64)])
def test_add_rms_norm_is_its_definition(dtype: torch.dtype, given: str, tokens: int, width: int) -> None:
    branch = torch.randn(tokens, 2 * width).to(dtype)[:, :width] if given != "residual" else None
    residual = torch.randn(tokens, width) if given != "branch" else None
    weight = torch.randn(width).to(dtype)
    y, total = kernels.add_rms_norm(branch, residual, weight, 1e-5)
    expected = sum(t.double() for t in (branch, residual) if t is not None)
    assert (y.dtype, total.dtype) == (dtype, torch.float32)
    assert_close(total.double(), expected, rtol=2e-7, atol=0)
    assert_close(y.double(), naive.rms_norm(expected, 1e-5) * weight.double(), **ROUNDING[dtype])


@pytest.mark.parametrize("given", ["branch", "residual", "both"])
@pytest.mark.parametrize(("width", "more"), [(37, 37), (5, 70), (70, 5)])
def test_appended_columns_are_normalised_with_the_sum(given: str, width: int, more: int) -> None:
    branch = torch.randn(3, width).bfloat16() if given != "residual" else None
    residual = torch.randn(3, width) if given != "branch" else None
    appended, weight = torch.randn(3, more + 4).bfloat16()[:, 4:], torch.randn(width + more)
    y, total = kernels.add_rms_norm(branch, residual, weight, 1e-5, appended)
    expected = sum(t.double() for t in (branch, residual) if t is not None)
    assert_close(total.double(), expected, rtol=2e-7, atol=0)
    row = torch.cat([expected, appended.double()], 1)
    assert_close(y.double(), naive.rms_norm(row, 1e-5) * weight.double(), **ROUNDING[torch.float32])
    with backend.using("reference", "cpu"):
        assert_close(y, kernels.add_rms_norm(branch, residual, weight, 1e-5, appended)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 16, 37, 1100])
def test_rms_normalize_of_views_of_a_projection(dtype: torch.dtype, width: int) -> None:
    packed = (10 * torch.randn(5, 3, width + 7)).to(dtype)
    for x in (packed[:, 0, 3 : 3 + width], packed[..., 7:], packed[:0, 0, 7:]):
        y = kernels.rms_normalize(x, 1e-6)
        assert y.dtype == dtype and y.is_contiguous()
        assert_close(y.double(), naive.rms_norm(x, 1e-6), **ROUNDING[dtype])


def test_nan_stays_in_its_row() -> None:
    x = torch.randn(4, 20)
    x[1] = torch.nan
    rows = [0, 2, 3]
    y, total = kernels.add_rms_norm(x, torch.randn(4, 20), torch.ones(20), 1e-5)
    for t in (y, total, kernels.rms_normalize(x, 1e-6)):
        assert t[1].isnan().all() and not t[rows].isnan().any()


def test_a_norm_of_zeros_is_zero() -> None:
    assert not kernels.rms_normalize(torch.zeros(2, 5), 1e-6).any()
