"""The Triton convolution, ragged and update, in the interpreter."""

import pytest
import torch

from ssm_dist import kernels
from ssm_dist.kernels import tuning
from tests.kernels import naive
from tests.kernels.checks import check_stateful
from tests.kernels.inputs import conv_inputs, offsets_of

pytestmark = pytest.mark.usefixtures("triton_backend")

SMALL = {"BLOCK_T": 8, "TILE": 4, "BLOCK_D": 16, "num_warps": 1}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("lengths", [[1], [2, 1, 0, 3], [63, 0, 1], [0, 0], []], ids=str)
@pytest.mark.parametrize("width", [2, 3, 4])
def test_conv_is_its_definition(lengths: list[int], width: int) -> None:
    check_stateful(kernels.causal_conv, naive.causal_conv, conv_inputs(lengths, 5, width, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 40])
@pytest.mark.parametrize("tile", [4, 8])
def test_conv_in_small_blocks_crosses_none_of_their_edges(
    dtype: torch.dtype, channels: int, tile: int
) -> None:
    """Sequences that end before, at and after the edges of tiles and blocks; tiles that are whole blocks."""
    with tuning.forced("causal_conv", {**SMALL, "TILE": tile}):
        check_stateful(
            kernels.causal_conv, naive.causal_conv, conv_inputs([7, 8, 0, 9, 17, 4], channels, 4, dtype)
        )


@pytest.mark.parametrize("lengths", [[1000], [100, 0, 300]], ids=["alone", "among others"])
def test_conv_of_a_long_prompt(lengths: list[int]) -> None:
    check_stateful(kernels.causal_conv, naive.causal_conv, conv_inputs(lengths, 140, 4, torch.float32))


def test_conv_finds_its_sequence_among_more_than_one_block_of_them() -> None:
    lengths = [0] * 290
    lengths[100], lengths[255], lengths[256], lengths[289] = 3, 1, 6, 2
    inputs = [*conv_inputs([12], 5, 4, torch.float32)[:3], torch.randn(300, 3, 5), offsets_of(lengths)]
    with tuning.forced("causal_conv", SMALL):
        check_stateful(kernels.causal_conv, naive.causal_conv, [*inputs, torch.randperm(300)[:290].int()])


@pytest.mark.parametrize("op", ["causal_conv", "causal_conv_update"])
def test_conv_without_bias(op: str) -> None:
    inputs = conv_inputs([1, 1], 5, 4, torch.float32)
    inputs[2] = None
    check_stateful(getattr(kernels, op), naive.causal_conv, inputs, update=op.endswith("update"))


def test_conv_in_chunks_equals_at_once() -> None:
    inputs = conv_inputs([37], 5, 4, torch.float32)
    parts = inputs[3].clone()
    whole = kernels.causal_conv(*inputs)
    for start, end in ((0, 1), (1, 3), (3, 20), (20, 37)):
        y = kernels.causal_conv(
            inputs[0][start:end], *inputs[1:3], parts, offsets_of([end - start]), inputs[-1]
        )
        assert torch.equal(y, whole[start:end])
    assert torch.equal(parts, inputs[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [2, 3, 4])
def test_update_is_its_definition(dtype: torch.dtype, width: int) -> None:
    inputs = conv_inputs([1] * 5, 5, width, dtype)
    with tuning.forced("causal_conv_update", {"SEQUENCES": 2, "BLOCK_D": 4, "num_warps": 1}):
        check_stateful(kernels.causal_conv_update, naive.causal_conv, inputs, update=True)


@pytest.mark.parametrize("sequences", [0, 1, 12])
def test_update_of_any_number_of_sequences(sequences: int) -> None:
    inputs = conv_inputs([1] * sequences, 5, 4, torch.float32)
    check_stateful(kernels.causal_conv_update, naive.causal_conv, inputs, update=True)


@pytest.mark.parametrize("lengths", [[3, 12, 9], [1, 1, 1]], ids=["prefill", "decode"])
def test_nan_in_a_neighbour_never_leaks(lengths: list[int]) -> None:
    inputs = conv_inputs(lengths, 5, 4, torch.float32)
    start, end = offsets_of(lengths)[1:3].tolist()
    inputs[0][start:end] = torch.nan
    inputs[3][inputs[-1][1].long()] = torch.nan
    decode = end - start == 1
    y = kernels.causal_conv_update(*inputs[:-2], inputs[-1]) if decode else kernels.causal_conv(*inputs)
    assert y[start:end].isnan().all() and not y[:start].isnan().any() and not y[end:].isnan().any()
    assert not inputs[3][inputs[-1][[0, 2]].long()].isnan().any()
