"""The definitions of the codecs: error bounds, layouts, and what happens to numbers that are none."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssm_dist.kernels.codecs import (
    decode_rows,
    encode_rows,
    encode_rows_with_feedback,
    row_layout,
    sum_rows,
    sum_rows_with_feedback,
)
from tests.kernels.codec_bounds import CODECS, QUANTISED, error_bound

pytestmark = pytest.mark.usefixtures("reference_backend")

each_codec = pytest.mark.parametrize(("codec", "group_size"), CODECS, ids=str)
each_quantised = pytest.mark.parametrize(("codec", "group_size"), QUANTISED, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
LARGEST = torch.finfo(torch.bfloat16).max


def there_and_back(x: Tensor, codec: str, group_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return decode_rows(encode_rows(x, codec, group_size, len(x)), x.shape[1], dtype, codec, group_size)


def special(width: int) -> Tensor:
    """Zeros, constants, one outlier, the largest bfloat16, tiny numbers, alternating signs."""
    x = torch.randn(8, width)
    x[0], x[1], x[2, width // 2] = 0.0, -0.37, 1e4
    x[3], x[4] = LARGEST, 1e-30 * x[4]
    x[5] *= (-1.0) ** torch.arange(width)
    x[6] = 0.0
    x[6, -1] = 1.0
    return x


@pytest.mark.parametrize("width", [1, 2, 31, 32, 33, 128, 300])
@each_codec
def test_the_error_stays_within_half_a_step(codec: str, group_size: int, width: int) -> None:
    for x in (special(width), torch.randn(5, width).bfloat16().float()):
        error = (there_and_back(x, codec, group_size) - x).double().abs()
        assert (error <= error_bound(x, codec, group_size)).all()


@each_quantised
def test_a_constant_row_comes_back(codec: str, group_size: int) -> None:
    x = torch.tensor([[0.0], [1.0], [-3.5], [LARGEST]]).expand(4, 70)
    torch.testing.assert_close(there_and_back(x, codec, group_size), x, rtol=1e-6, atol=0)


@each_dtype
@each_codec
def test_any_dtype_is_widened_first(codec: str, group_size: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 45).to(dtype)
    wide = x if codec == "none" else x.float()
    expected = there_and_back(wide, codec, group_size, torch.float32 if codec != "none" else dtype)
    assert torch.equal(there_and_back(x, codec, group_size, dtype), expected.to(dtype))


@each_codec
def test_rows_do_not_depend_on_each_other(codec: str, group_size: int) -> None:
    x = torch.randn(6, 77)
    together = encode_rows(x, codec, group_size, 9)
    alone = torch.cat([encode_rows(row, codec, group_size, 1) for row in x.split(1)])
    assert together.shape == (9, row_layout(77, x.dtype, codec, group_size).bytes)
    assert torch.equal(together[:6], alone)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@each_quantised
def test_a_number_that_is_none_takes_its_group_with_it_and_no_other(
    codec: str, group_size: int, value: float
) -> None:
    x = torch.randn(3, 2 * group_size + 3)
    x[1, group_size + 5], x[2, -1] = value, value
    lost = torch.zeros(x.shape, dtype=torch.bool)
    lost[1, group_size : 2 * group_size] = True
    lost[2, 2 * group_size :] = True
    assert torch.equal(there_and_back(x, codec, group_size).isnan(), lost)


@each_codec
def test_a_sum_is_taken_in_float32_in_order_and_encoded_again(codec: str, group_size: int) -> None:
    x = torch.randn(5, 4, 99, dtype=torch.float32) * torch.tensor([1e4, 1.0, 1e-4, 1.0, 1e4]).view(5, 1, 1)
    parts = torch.stack([encode_rows(part, codec, group_size, 4) for part in x])
    total = torch.zeros(4, 99)
    for part in parts:
        total = total + decode_rows(part, 99, torch.float32, codec, group_size)
    expected = encode_rows(total, codec, group_size, 4)
    assert torch.equal(sum_rows(parts, 99, torch.float32, codec, group_size), expected)


@each_codec
def test_a_part_that_was_not_encoded_enters_the_sum_as_it_is(codec: str, group_size: int) -> None:
    x = torch.randn(3, 4, 99)
    parts = torch.stack([encode_rows(part, codec, group_size, 4) for part in x])
    parts[1] = 255  # not looked at
    ends = [decode_rows(parts[rank], 99, torch.float32, codec, group_size) for rank in (0, 2)]
    expected = encode_rows(ends[0] + x[1] + ends[1], codec, group_size, 4)
    assert torch.equal(sum_rows(parts, 99, torch.float32, codec, group_size, x[1], 1), expected)


@each_dtype
@each_quantised
def test_with_feedback_the_error_is_encoded_too_and_what_that_drops_is_kept(
    codec: str, group_size: int, dtype: torch.dtype
) -> None:
    x, error = torch.randn(4, 77).to(dtype), (0.1 * torch.randn(4, 77)).to(dtype)
    for before in (error, None):
        given = x.float() + (0 if before is None else before.float())
        encoded, left = encode_rows_with_feedback(x, before, codec, group_size, 6)
        assert left.dtype == dtype
        assert torch.equal(encoded[:4], encode_rows(given, codec, group_size, 4))
        dropped = given - decode_rows(encoded[:4], 77, torch.float32, codec, group_size)
        assert torch.equal(left, dropped.to(dtype))


@each_dtype
@each_quantised
def test_a_sum_with_feedback_accounts_for_its_rounding(
    codec: str, group_size: int, dtype: torch.dtype
) -> None:
    layout, error = (99, dtype, codec, group_size), (0.1 * torch.randn(4, 99)).to(dtype)
    parts = torch.stack([encode_rows(torch.randn(4, 99), codec, group_size, 4) for _ in range(3)])
    for before in (error, None):
        given = sum(decode_rows(part, 99, torch.float32, codec, group_size) for part in parts)
        given = given if before is None else given + before.float()
        encoded, left = sum_rows_with_feedback(parts, before, *layout)
        assert torch.equal(encoded, encode_rows(given, codec, group_size, 4))
        assert torch.equal(left, (given - decode_rows(encoded, *layout).float()).to(dtype))


@each_quantised
def test_many_messages_with_feedback_lack_what_one_does(codec: str, group_size: int) -> None:
    """Without it, what they lack grows with their number."""
    messages, layout = torch.randn(60, 2, 300), (300, torch.float32, codec, group_size)
    sent, error = torch.zeros(2, 300, dtype=torch.float64), None
    for x in messages:
        given = x if error is None else x + error
        encoded, error = encode_rows_with_feedback(x, error, codec, group_size, 2)
        sent += decode_rows(encoded, *layout)
    lacking = (messages.double().sum(0) - sent).abs()
    rounding = 60 * 2.0**-24 * (given.abs().max() + 1)
    assert (lacking <= error_bound(given, codec, group_size) + rounding).all()
    plain = sum(there_and_back(x, codec, group_size).double() for x in messages)
    assert lacking.square().mean() < 0.1 * (messages.double().sum(0) - plain).square().mean()


@pytest.mark.parametrize(
    ("codec", "width", "group_size", "size"),
    [
        ("none", 2560, 128, 5120),
        ("int8", 2560, 128, 2640),
        ("fp8", 2560, 32, 2880),
        ("int4", 2560, 32, 1600),
        ("int4", 37, 32, 32),
        ("int8", 37, 32, 48),
    ],
)
def test_bytes_of_a_bfloat16_row(codec: str, width: int, group_size: int, size: int) -> None:
    assert row_layout(width, torch.bfloat16, codec, group_size).bytes == size


def test_four_bits_are_packed_first_low_with_their_sign() -> None:
    x = torch.tensor([[7.0, -8.0, 1.0, -1.0, -3.0]])
    encoded = encode_rows(x, "int4", 32, 1)
    assert encoded[0, :3].tolist() == [0x87, 0xF1, 0x0D]
    assert torch.equal(decode_rows(encoded, 5, torch.float32, "int4", 32), x)


def test_of_four_bits_the_peak_comes_back_on_either_side() -> None:
    x = torch.tensor([[4.0, 3.6, -3.5, 0.1], [-4.0, -3.6, 3.5, 0.1], [4.0, -4.0, 3.9, -3.5]])
    expected = torch.tensor([[4.0, 3.5, -3.5, 0.0], [-4.0, -3.5, 3.5, 0.0], [3.5, -4.0, 3.5, -3.5]])
    assert torch.equal(there_and_back(x, "int4", 32), expected)


def test_ties_go_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert there_and_back(x, "int8", 32).tolist() == [[127.0, 0.0, 2.0, 2.0, 0.0, -2.0]]


@each_quantised
def test_integers_are_refused(codec: str, group_size: int) -> None:
    with pytest.raises(ValueError, match=r"takes float32, bfloat16 or float16, not torch\.int64"):
        encode_rows(torch.ones(2, 3, dtype=torch.int64), codec, group_size, 2)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=70),
    st.sampled_from(QUANTISED),
)
def test_any_numbers_stay_within_the_bound(numbers: list[float], codec: tuple[str, int]) -> None:
    x = torch.tensor([numbers])
    error = (there_and_back(x, *codec) - x).double().abs()
    assert (error <= error_bound(x, *codec)).all()
