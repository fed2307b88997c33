"""The Triton codecs in the interpreter: the bits of the definitions, where the interpreter has them.

It truncates float32 to bfloat16, which the tests avoid; a GPU is asked for all the bits in `tests/gpu`.
"""

import pytest
import torch
from torch import Tensor

from ssm_dist.kernels import backend
from ssm_dist.kernels.codecs import (
    decode_rows,
    encode_rows,
    encode_rows_with_feedback,
    row_layout,
    sum_rows,
    sum_rows_with_feedback,
)
from tests.kernels.codec_bounds import CODECS, QUANTISED

pytestmark = pytest.mark.usefixtures("triton_backend")

each_codec = pytest.mark.parametrize(("codec", "group_size"), CODECS, ids=str)
each_shape = pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 37), (4, 512), (5, 700), (2, 1030)])


def written(encoded: Tensor, width: int, dtype: torch.dtype, codec: str, group_size: int) -> Tensor:
    """The bytes that mean something: without the padding of rows."""
    layout = row_layout(width, dtype, codec, group_size)
    scales = encoded[:, layout.scales : layout.scales + 4 * layout.groups]
    return torch.cat([encoded[:, : layout.payload], scales], dim=1)


def difficult(rows: int, width: int) -> Tensor:
    """Magnitudes from 1e-38 to 1e38, ties, zeros."""
    x = torch.randn(rows, width) * 10.0 ** torch.linspace(-38, 37, rows * width).view(rows, width)
    x[0] = (127 * torch.rand(width)).round() / 2
    x[0, 0] = 127.0
    x[-1, : width // 2] = 0.0
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_shape
@each_codec
def test_encoding_gives_the_definitions_bits(
    codec: str, group_size: int, rows: int, width: int, dtype: torch.dtype
) -> None:
    for x in (torch.randn(rows, width).to(dtype), difficult(rows, width).clamp(-6e4, 6e4).to(dtype)):
        encoded = encode_rows(x, codec, group_size, rows + 1)
        with backend.using("reference"):
            expected = encode_rows(x, codec, group_size, rows)
        layout = (width, dtype, codec, group_size)
        assert torch.equal(written(encoded[:rows], *layout), written(expected, *layout))


@each_shape
@each_codec
def test_decoding_and_sums_give_the_definitions_bits(
    codec: str, group_size: int, rows: int, width: int
) -> None:
    layout = (width, torch.float32, codec, group_size)
    parts = torch.stack([encode_rows(torch.randn(rows, width), codec, group_size, rows) for _ in range(3)])
    x, own = decode_rows(parts[1], *layout), torch.randn(rows, width + 3)[:, 3:]
    for given in ((), (own, 1), (own, 2)):
        total = sum_rows(parts, *layout, *given)
        with backend.using("reference"):
            assert torch.equal(x, decode_rows(parts[1], *layout))
            assert torch.equal(written(total, *layout), written(sum_rows(parts, *layout, *given), *layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@each_shape
@pytest.mark.parametrize(("codec", "group_size"), QUANTISED, ids=str)
def test_feedback_gives_the_definitions_bits(
    codec: str, group_size: int, rows: int, width: int, dtype: torch.dtype
) -> None:
    layout = (width, dtype, codec, group_size)
    x = torch.randn(2, rows, 2 * width).to(dtype)[:, :, ::2]
    x[1, -1, 0] = torch.nan
    error = (0.1 * torch.randn(rows, width)).to(dtype)
    parts = torch.stack([encode_rows(part, codec, group_size, rows) for part in x])
    for before in (error, None):
        found = encode_rows_with_feedback(x[0], before, codec, group_size, rows)
        summed = sum_rows_with_feedback(parts, before, *layout)
        with backend.using("reference"):
            expected = encode_rows_with_feedback(x[0], before, codec, group_size, rows)
            total = sum_rows_with_feedback(parts, before, *layout)
        for (encoded, left), (its, other) in ((found, expected), (summed, total)):
            assert torch.equal(written(encoded, *layout), written(its, *layout))
            torch.testing.assert_close(left, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@each_codec
def test_what_is_no_number_takes_its_group_alone(codec: str, group_size: int, value: float) -> None:
    x = torch.randn(3, 2 * group_size + 3)
    x[1, group_size + 5], x[2, -1] = value, value
    encoded = encode_rows(x, codec, group_size, 3)
    layout = (x.shape[1], torch.float32, codec, group_size)
    with backend.using("reference"):
        expected = decode_rows(encode_rows(x, codec, group_size, 3), *layout)
    torch.testing.assert_close(decode_rows(encoded, *layout), expected, rtol=0, atol=0, equal_nan=True)
    parts = torch.stack([encode_rows(torch.randn_like(x), codec, group_size, 3), encoded])
    total = decode_rows(sum_rows(parts, *layout), *layout)
    assert torch.equal(total.isfinite(), expected.isfinite())


@each_codec
def test_rows_with_a_stride(codec: str, group_size: int) -> None:
    x = torch.randn(5, 80)
    dense = encode_rows(x[:, 8:60].contiguous(), codec, group_size, 5)
    layout = (52, x.dtype, codec, group_size)
    assert torch.equal(
        written(encode_rows(x[:, 8:60], codec, group_size, 5), *layout), written(dense, *layout)
    )
    transposed = x.T.contiguous().T[:, 8:60]
    assert torch.equal(
        written(encode_rows(transposed, codec, group_size, 5), *layout), written(dense, *layout)
    )
