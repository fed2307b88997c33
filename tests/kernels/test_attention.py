"""Paged attention against a softmax written out in float64 (`naive`)."""

import pytest
import torch
from torch.testing import assert_close

from ssm_dist import kernels
from tests.kernels import naive
from tests.kernels.inputs import attention_inputs, offsets_of

pytestmark = pytest.mark.usefixtures("reference_backend")

CONTEXTS = [
    ([1], [0]),
    ([9], [0]),
    ([1, 1, 1], [0, 7, 12]),
    ([3, 0, 17, 1], [5, 4, 0, 31]),
    ([40, 2], [8, 0]),
]


@pytest.mark.parametrize(("lengths", "before"), CONTEXTS, ids=lambda n: "-".join(map(str, n)))
@pytest.mark.parametrize(("heads", "head_dim", "page_size"), [(1, 8, 4), (4, 29, 4), (2, 58, 16), (3, 1, 1)])
def test_attention_is_a_softmax_over_everything_before(
    lengths: list[int], before: list[int], heads: int, head_dim: int, page_size: int
) -> None:
    inputs = attention_inputs(lengths, before, heads, head_dim, page_size, torch.float64)
    expected, keys, values = naive.paged_attention(*inputs)
    y = kernels.paged_attention(*inputs)
    assert_close(y, expected)
    assert_close(inputs[3], keys, rtol=0, atol=0, equal_nan=True)
    assert_close(inputs[4], values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)], ids=str)
def test_attention_rounds_as_its_inputs(dtype: torch.dtype, tolerance: float) -> None:
    inputs = attention_inputs([3, 17], [5, 0], 2, 29, 4, dtype)
    expected = naive.paged_attention(*inputs)[0]
    y = kernels.paged_attention(*inputs)
    assert y.dtype == dtype
    assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_attention_in_chunks_equals_at_once(chunk: int) -> None:
    inputs = attention_inputs([30], [0], 2, 12, 4, torch.float64)
    keys, values, positions, pages, scale = *(t.clone() for t in inputs[3:5]), *inputs[6:]
    whole = kernels.paged_attention(*inputs)
    for done in range(0, 30, chunk):
        new = slice(done, min(done + chunk, 30))
        offsets = offsets_of([new.stop - new.start])
        qkv = [t[new] for t in inputs[:3]]
        assert_close(
            kernels.paged_attention(*qkv, keys, values, offsets, positions[new], pages, scale), whole[new]
        )
    assert_close(keys, inputs[3], equal_nan=True)
