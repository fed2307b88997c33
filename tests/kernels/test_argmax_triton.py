"""The largest number of each row: the Triton kernel in the interpreter against torch.max."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ssm_dist import kernels
from ssm_dist.kernels import backend, triton_argmax, tuning

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan
SPECIAL = {
    "ties": [1.0, 3.0, 2.0, 3.0, 3.0],
    "zeros": [-1.0, -0.0, 0.0, -0.0],
    "minus zero": [-0.0, 0.0],
    "all -inf": [-INF] * 40,
    "one above -inf": [-INF] * 37 + [-3e4, -INF],
    "inf": [1.0, INF, 2.0, INF],
    "nan above inf": [INF, 1.0, NAN, INF, NAN],
    "negative nan": [INF, -NAN, NAN],
    "negative": [-3.0, -1.0, -2.0, -1.0],
    "tiny": [-1e-7, 0.0, 1e-7, 6e-8],
    "one": [-7.0],
    "many equal": [2.0] * 70,
}


def check(logits: Tensor) -> None:
    values, ids = kernels.largest(logits)
    expected, expected_ids = torch.max(logits, dim=-1)
    assert (values.dtype, ids.dtype) == (logits.dtype, torch.int64)
    assert torch.equal(ids, expected_ids)
    assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(params=[16, 1024], ids=["shared rows", "a program a row"])
def _blocks(request: pytest.FixtureRequest, triton_backend: None):
    with tuning.forced("largest", {"BLOCK": request.param, "num_warps": 4}):
        yield


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_numbers_rank_as_in_torch(name: str, dtype: torch.dtype) -> None:
    row = torch.tensor(SPECIAL[name]).to(dtype)
    check(row[None])
    check(torch.cat([torch.full((33,), -INF, dtype=dtype), row])[None])
    check(torch.stack([row, row.flip(0), torch.zeros_like(row)]))


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(0, 5), (1, 1), (1, 48), (3, 37), (2, 250), (65, 33)])
def test_largest_is_torchs_max_of_strided_rows(rows: int, width: int, dtype: torch.dtype) -> None:
    packed = torch.randn(rows, 2, width + 7).mul(4).round().to(dtype)  # ties
    for logits in (packed[:, 0, :width], packed[:, 1, 7:], packed[:, 0, 1 : width + 1].contiguous()):
        check(logits)
        check(logits[::2])
    if rows:
        check(packed[0, 0, :width].expand(rows, -1))


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize(
    "change",
    [lambda x: x.double(), lambda x: x.T, lambda x: x.repeat(2000, 1)],
    ids=["float64", "columns apart", "more rows than counters"],
)
def test_what_the_kernel_does_not_serve_is_torchs(
    change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_argmax, "_largest", None)
    check(change(torch.randn(3, 40)))


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("width", [50_280, 65_024, 50_277])
def test_vocabularies_of_the_released_models(width: int) -> None:
    packed = torch.randn(2, width + 11).bfloat16()
    packed[:, width:] = torch.nan
    check(packed[:1, :width])
    check(packed[:, :width])


@pytest.mark.usefixtures("_blocks")
def test_random_bits_rank_as_in_torch() -> None:
    """Numbers of any magnitude, with NaN of any payload and sign, and without."""
    logits = torch.randint(-(2**15), 2**15, (40, 200)).short().view(torch.bfloat16)
    assert logits.isnan().any(1).any() and not logits.isnan().any(1).all()
    check(logits)
    check(logits.nan_to_num(-INF, INF, -INF))


@pytest.mark.usefixtures("triton_backend")
def test_largest_compiles_whole() -> None:
    compiled = torch.compile(
        lambda x: kernels.largest(x[:, :50]), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (1, 2, 5):
        logits = torch.randn(rows, 64).bfloat16()
        for ours, expected in zip(compiled(logits), torch.max(logits[:, :50], dim=-1), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_the_definition_takes_the_lowest_column(dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 5000, dtype=dtype)
    logits[0, [4000, 17, 18]] = 2.0
    logits[1, [30, 4999]] = NAN
    with backend.using("reference", "cpu"):
        values, ids = kernels.largest(logits)
    assert ids.tolist() == [17, 30] and values[0] == 2 and values[1].isnan()
