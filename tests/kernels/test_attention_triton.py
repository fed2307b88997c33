"""Paged attention in Triton, in the interpreter."""

import importlib
import importlib.util

import pytest
import torch
from torch.testing import assert_close

from ssm_dist import kernels
from ssm_dist.kernels import tuning
from tests.kernels import naive
from tests.kernels.checks import ROUNDING
from tests.kernels.inputs import attention_inputs

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.fixture(autouse=True)
def a_small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that contexts are cut into few parts."""
    if importlib.util.find_spec("triton") is not None:
        monkeypatch.setattr(importlib.import_module("ssm_dist.kernels.triton_attention"), "PROGRAMS", 9)


SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}

FEW = [([1], [0]), ([1], [37]), ([1, 1, 1], [0, 7, 12]), ([2, 0, 1], [3, 9, 18]), ([0], [5])]
MANY = [([9], [0]), ([3, 0, 17, 1], [5, 4, 0, 31]), ([35, 2], [8, 0])]


@pytest.mark.parametrize(("lengths", "before"), FEW + MANY, ids=str)
@pytest.mark.parametrize(("heads", "head_dim", "page_size"), [(2, 29, 4), (1, 8, 16)])
def test_attention_is_its_definition(
    lengths: list[int], before: list[int], heads: int, head_dim: int, page_size: int
) -> None:
    """Also where everything that must not be read is NaN."""
    inputs = attention_inputs(lengths, before, heads, head_dim, page_size, torch.float32)
    expected, keys, values = naive.paged_attention(*inputs)
    with tuning.forced("paged_attention", SMALL):
        y = kernels.paged_attention(*inputs)
    assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert_close(inputs[3].double(), keys, rtol=0, atol=0, equal_nan=True)
    assert_close(inputs[4].double(), values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("lengths", "before"), [([1, 1], [3, 20]), ([18, 1], [5, 0])], ids=["few", "many"])
def test_attention_rounds_as_its_inputs(dtype: torch.dtype, lengths: list[int], before: list[int]) -> None:
    """Where many queries share a program, the shares are rounded too, as the tensor cores want them."""
    inputs = attention_inputs(lengths, before, 2, 29, 16, dtype)
    expected = naive.paged_attention(*inputs)[0]
    with tuning.forced("paged_attention", SMALL):
        y = kernels.paged_attention(*inputs)
    bound = 2 * ROUNDING[dtype]["rtol"]
    assert y.dtype == dtype
    assert_close(y.double(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("heads", [3, 4, 9])
def test_several_heads_of_a_token_are_stored_by_one_program(
    heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("ssm_dist.kernels.triton_attention"), "STORING", 0)
    inputs = attention_inputs([2, 0, 3], [3, 9, 0], heads, 12, 4, torch.float32)
    _, keys, values = naive.paged_attention(*inputs)
    with tuning.forced("paged_attention", SMALL):
        kernels.paged_attention(*inputs)
    assert_close(inputs[3].double(), keys, rtol=0, atol=0, equal_nan=True)
    assert_close(inputs[4].double(), values, rtol=0, atol=0, equal_nan=True)


def test_attention_of_views_of_one_projection() -> None:
    inputs = attention_inputs([3], [5], 2, 8, 4, torch.float32)
    packed = torch.stack(inputs[:3], 1)
    expected = naive.paged_attention(*inputs)[0]
    assert_close(
        kernels.paged_attention(*packed.unbind(1), *inputs[3:]).double(), expected, rtol=1e-5, atol=1e-5
    )


def test_attention_of_no_tokens() -> None:
    inputs = attention_inputs([0, 0], [2, 0], 2, 8, 4, torch.float32)
    assert kernels.paged_attention(*inputs).shape == (0, 2, 8)
