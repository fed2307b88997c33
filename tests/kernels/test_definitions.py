"""Convolution and scan against loops over tokens in float64 (`naive`), and their other promises."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ssm_dist import kernels
from ssm_dist.kernels.linear import linear_by_head
from tests.kernels import naive
from tests.kernels.inputs import SLOTS, conv_inputs, offsets_of, scan_inputs

pytestmark = pytest.mark.usefixtures("reference_backend")

LENGTHS = [[1], [5], [1, 1, 1], [0, 1, 7, 0, 2], [31, 33, 1, 64], [100], [2, 3, 1000], [0, 0]]
"""Tokens a sequence: empty and one-token ones, prompts shorter than the convolution, odd, past one block."""

lengths_of = pytest.mark.parametrize("lengths", LENGTHS, ids=lambda n: "tokens" + "-".join(map(str, n)))

STATE = {"conv": 3, "scan": 8}
"""Where the state is among the arguments; offsets and slots are the last two."""
PER_TOKEN = {"conv": (0,), "scan": (0, 1, 3, 4, 6)}
INPUTS = {"conv": conv_inputs, "scan": scan_inputs}
OPS = {"conv": kernels.causal_conv, "scan": kernels.selective_scan}
UPDATES = {"conv": kernels.causal_conv_update, "scan": kernels.selective_state_update}
NAIVE = {"conv": naive.causal_conv, "scan": naive.selective_scan}
each_op = pytest.mark.parametrize("op", ["conv", "scan"])


def with_own_state(op: str, inputs: list[Any]) -> list[Any]:
    """The same arguments with a copy of the state, since the ops write it."""
    return [t.clone() if i == STATE[op] else t for i, t in enumerate(inputs)]


def twice(make: Callable[[], list[Any]]) -> tuple[list[Any], list[Any]]:
    """The same inputs twice, in the same strides: strided and dense tensors may round differently."""
    state = torch.get_rng_state()
    first = make()
    torch.set_rng_state(state)
    return first, make()


def rows_only(op: str, inputs: list[Any], rows: Tensor | slice) -> list[Any]:
    """The arguments with these rows of the packed tokens."""
    return [t[rows] if i in PER_TOKEN[op] else t for i, t in enumerate(inputs)]


def check_against_naive(op: str, inputs: list[Any], **tolerance: float) -> None:
    """Output as naive; states named as naive; states not named bit for bit as before."""
    mine = with_own_state(op, inputs)
    y = OPS[op](*mine)
    expected, expected_state = NAIVE[op](*inputs)
    state, before, slots = mine[STATE[op]], inputs[STATE[op]], inputs[-1].long()
    assert y.dtype == inputs[0].dtype
    assert_close(y.double(), expected, **tolerance)
    assert_close(state[slots].double(), expected_state[slots], **tolerance)
    others = torch.ones(SLOTS, dtype=torch.bool).index_fill(0, slots, False)
    assert torch.equal(state[others], before[others])


@lengths_of
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_conv_is_its_definition(lengths: list[int], width: int, bias: bool) -> None:
    inputs = conv_inputs(lengths, width=width)
    check_against_naive("conv", [*inputs[:2], inputs[2] if bias else None, *inputs[3:]])


@lengths_of
@pytest.mark.parametrize(
    ("channels", "states", "groups"), [(1, 1, 1), (5, 16, 1), (6, 8, 2), (12, 4, 3), (4, 64, 4)]
)
def test_scan_is_its_definition(lengths: list[int], channels: int, states: int, groups: int) -> None:
    check_against_naive("scan", scan_inputs(lengths, channels, states, groups))


@each_op
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.bfloat16, 2**-7)], ids=str)
def test_rounding_is_that_of_the_inputs_dtype(op: str, dtype: torch.dtype, tolerance: float) -> None:
    check_against_naive(op, INPUTS[op]([5, 40, 1], dtype=dtype), atol=tolerance, rtol=tolerance)


def test_a_state_of_16_bits_is_rounded_once_a_call() -> None:
    inputs = scan_inputs([50], dtype=torch.float32)
    inputs[STATE["scan"]] = inputs[STATE["scan"]].bfloat16()
    _, expected = naive.selective_scan(*inputs)
    kernels.selective_scan(*inputs)
    slot = inputs[-1].long()
    assert inputs[STATE["scan"]].dtype == torch.bfloat16
    assert_close(inputs[STATE["scan"]][slot].double(), expected[slot], rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("dt", [-60.0, 60.0, 1e4])
def test_scan_survives_steps_that_forget_everything_or_nothing(dt: float) -> None:
    inputs = scan_inputs([70, 3])
    inputs[1] = torch.full_like(inputs[1], dt)
    check_against_naive("scan", inputs)


@each_op
@lengths_of
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_in_chunks_equals_at_once(op: str, lengths: list[int], chunk: int) -> None:
    inputs = INPUTS[op](lengths)
    whole, parts = with_own_state(op, inputs), with_own_state(op, inputs)
    expected = OPS[op](*whole)
    y, starts = torch.full_like(expected, torch.nan), offsets_of(lengths)[:-1]
    for done in range(0, max(lengths), chunk):
        taken = [min(chunk, max(n - done, 0)) for n in lengths]
        rows = torch.cat([torch.arange(s + done, s + done + n) for s, n in zip(starts, taken, strict=True)])
        y[rows] = OPS[op](*rows_only(op, parts, rows)[:-2], offsets_of(taken), inputs[-1])
    assert_close(y, expected)
    assert_close(parts[STATE[op]], whole[STATE[op]])


@each_op
@pytest.mark.parametrize("sequences", [1, 3, SLOTS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_update_equals_the_op_on_one_token_a_sequence(op: str, sequences: int, dtype: torch.dtype) -> None:
    inputs = INPUTS[op]([1] * sequences, dtype=dtype)
    ragged, update = with_own_state(op, inputs), with_own_state(op, inputs)
    expected = OPS[op](*ragged)
    y = UPDATES[op](*update[:-2], update[-1])
    assert y.dtype == expected.dtype
    assert_close(y, expected)
    assert_close(update[STATE[op]], ragged[STATE[op]])


def test_update_of_heads_equals_the_scan() -> None:
    inputs = scan_inputs([1, 1, 1], channels=12, groups=3)
    ragged, update = with_own_state("scan", inputs), with_own_state("scan", inputs)
    assert_close(kernels.selective_state_update(*update[:-2], update[-1]), kernels.selective_scan(*ragged))
    assert_close(update[STATE["scan"]], ragged[STATE["scan"]])


@each_op
@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
def test_nan_in_a_neighbour_never_leaks(op: str, decode: bool) -> None:
    """NaN in one sequence's tokens and state, and in all slots not named: the other rows keep their bits."""
    lengths = [1, 1, 1] if decode else [3, 40, 9]
    start, end = offsets_of(lengths).tolist()[1:3]
    clean, poisoned = twice(lambda: INPUTS[op](lengths))
    for i in PER_TOKEN[op]:
        poisoned[i][start:end] = torch.nan
    kept = clean[-1][[0, 2]].long()
    unnamed = torch.ones(SLOTS, dtype=torch.bool).index_fill(0, kept, False)
    poisoned[STATE[op]][unnamed] = torch.nan
    if decode:
        expected, y = (UPDATES[op](*inputs[:-2], inputs[-1]) for inputs in (clean, poisoned))
    else:
        expected, y = (OPS[op](*inputs) for inputs in (clean, poisoned))
    others = torch.ones(len(y), dtype=torch.bool)
    others[start:end] = False
    assert torch.equal(y[others], expected[others])
    assert torch.equal(poisoned[STATE[op]][kept], clean[STATE[op]][kept])
    assert poisoned[STATE[op]][unnamed].isnan().all()


@each_op
def test_a_sequence_in_a_batch_equals_it_alone(op: str) -> None:
    lengths = [3, 40, 0, 9]
    inputs = INPUTS[op](lengths)
    together = with_own_state(op, inputs)
    y, bounds = OPS[op](*together), offsets_of(lengths).tolist()
    for s, n in enumerate(lengths):
        alone = with_own_state(op, inputs)
        rows = slice(bounds[s], bounds[s + 1])
        assert_close(
            OPS[op](*rows_only(op, alone, rows)[:-2], offsets_of([n]), alone[-1][s : s + 1]), y[rows]
        )
        slot = int(alone[-1][s])
        assert_close(alone[STATE[op]][slot], together[STATE[op]][slot])


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_each_head_is_expanded_by_its_rows(heads: int) -> None:
    """From a part of wider rows, as the mixer gives it."""
    x, weight = torch.randn(5, heads, 9).double()[..., :7], nn.Parameter(torch.randn(heads * 4, 7).double())
    y = linear_by_head(x, weight)
    blocks = [x[:, head] @ rows.T for head, rows in enumerate(weight.chunk(heads))]
    assert y.is_contiguous()
    assert_close(y, torch.cat(blocks, 1))
    compiled = torch.compile(linear_by_head, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), y)
