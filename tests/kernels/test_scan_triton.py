"""The selective scan in plain Triton, in the interpreter."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from ssm_dist import kernels
from tests.kernels import naive
from tests.kernels.checks import check_stateful
from tests.kernels.inputs import scan_inputs

pytestmark = pytest.mark.usefixtures("triton_backend")

STATE = 8


def scan(chunk: int) -> Callable[..., Tensor]:
    """The kernel in chunks of so many tokens, 0 for whole sequences."""
    from ssm_dist.kernels import triton_scan

    return partial(triton_scan.scan, chunk=chunk)


@pytest.mark.parametrize("chunk", [0, 16])
@pytest.mark.parametrize("lengths", [[1], [2], [3], [63], [5, 0, 1, 20], [0], []], ids=str)
def test_scan_is_its_definition(lengths: list[int], chunk: int) -> None:
    check_stateful(scan(chunk), naive.selective_scan, scan_inputs(lengths, 3, 8, 1, torch.float32))


@pytest.mark.parametrize("chunk", [0, 128])
def test_scan_of_a_thousand_tokens(chunk: int) -> None:
    check_stateful(scan(chunk), naive.selective_scan, scan_inputs([1000], 2, 8, 1, torch.float32))


def test_scan_of_sequences_that_end_before_on_and_after_a_chunk() -> None:
    inputs = scan_inputs([16, 17, 0, 1, 15, 33, 32, 7], 2, 8, 1, torch.float32)
    check_stateful(scan(16), naive.selective_scan, inputs)


@pytest.mark.parametrize(
    ("channels", "states", "groups"),
    [(1, 16, 1), (33, 8, 1), (64, 8, 1), (2, 32, 1), (2, 64, 1), (6, 8, 3), (80, 8, 2)],
)
def test_scan_of_any_shape(channels: int, states: int, groups: int) -> None:
    inputs = scan_inputs([4, 0, 3], channels, states, groups, torch.float32)
    check_stateful(scan(0), naive.selective_scan, inputs)


@pytest.mark.parametrize("activation", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scan_rounds_once(activation: torch.dtype, state: torch.dtype) -> None:
    inputs = scan_inputs([20, 4], 3, 8, 1, activation)
    inputs[STATE] = inputs[STATE].to(state)
    check_stateful(scan(16), naive.selective_scan, inputs)


@pytest.mark.parametrize("dt", [-60.0, -12.0, 0.0, 12.0, 60.0, 1e4])
def test_scan_keeps_its_precision_for_any_step(dt: float) -> None:
    """Also where 1 + exp(dt) rounds to 1; the rounding of exp's argument alone costs 4e-6 at dt = -60."""
    inputs = scan_inputs([1, 1], 6, 8, 1, torch.float32)
    inputs[1] = torch.full_like(inputs[1], dt)
    inputs[STATE] = torch.zeros_like(inputs[STATE])
    expected = naive.selective_scan(*inputs)[1]
    scan(0)(*inputs)
    slots = inputs[-1].long()
    torch.testing.assert_close(inputs[STATE][slots].double(), expected[slots], rtol=5e-6, atol=1e-35)


def test_nan_stays_in_its_sequence_and_its_channel() -> None:
    inputs = scan_inputs([4, 18, 3], 4, 8, 1, torch.float32)
    inputs[0][5, 1] = torch.nan
    y = scan(16)(*inputs)
    spoilt = torch.zeros_like(y, dtype=torch.bool)
    spoilt[5:22, 1] = True
    assert torch.equal(y.isnan(), spoilt)
    ends = inputs[STATE][inputs[-1].long()]
    spoilt = torch.zeros_like(ends, dtype=torch.bool)
    spoilt[1, 1] = True
    assert torch.equal(ends.isnan(), spoilt)


def test_the_op_is_traced_whole_and_writes_the_state_in_place() -> None:
    step = torch.compile(kernels.selective_scan, fullgraph=True, backend="aot_eager")
    inputs = scan_inputs([3, 2], 4, 8, 1, torch.float32)
    check_stateful(step, naive.selective_scan, inputs)
    op = torch.ops.ssm_dist.selective_scan.default
    torch.library.opcheck(op, inputs, test_utils=("test_schema", "test_faketensor"))


def test_time_is_cut_only_where_channels_do_not_fill_the_gpu() -> None:
    from ssm_dist.kernels.triton_scan import chunk_tokens

    assert chunk_tokens(tokens=8 * 8192, sequences=8, channels=5120) == 0
    assert chunk_tokens(tokens=32, sequences=1, channels=64) == 0
    assert 64 <= chunk_tokens(tokens=8192, sequences=1, channels=1280) <= 512
