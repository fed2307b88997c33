"""The Triton kernels compiled, at real shapes, against the definitions in float64 on the same inputs.

Small cases for `compute-sanitizer`: -k small.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ssm_dist import kernels
from ssm_dist.kernels import backend
from ssm_dist.kernels.codecs import (
    decode_rows,
    encode_rows,
    encode_rows_with_feedback,
    sum_rows_with_feedback,
)
from tests.kernels.codec_bounds import QUANTISED
from tests.kernels.inputs import attention_inputs, conv_inputs, offsets_of, scan_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or backend.interpreting(), reason="needs a GPU"),
]

OUTPUT_ERROR = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 1e-5}
STATE_ERROR = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 1e-5}
"""Largest relative L2 error of output and state, by dtype."""

MAKE: dict[str, Callable[..., list[Any]]] = {
    "causal_conv": conv_inputs,
    "causal_conv_update": conv_inputs,
    "selective_scan": scan_inputs,
    "selective_state_update": scan_inputs,
}


def make(op: str, *sizes: Any, **options: Any) -> list[Any]:
    """Arguments of an op on the GPU."""
    with torch.device("cuda"):
        return MAKE[op](*sizes, **options)


STATE = -3
"""Place of the state in the arguments of a ragged op: before offsets and slots."""

RAGGED = ["causal_conv", "selective_scan"]
UPDATES = ["causal_conv_update", "selective_state_update"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

MIXED = [1000, 0, 1, 63, 2, 0, 3, 977, 4, 31]
"""Empty, one-token and odd lengths."""


@pytest.fixture(autouse=True)
def triton_with_poisoned_memory() -> Iterator[None]:
    """The compiled kernels; fresh memory holds NaN, so that an element that is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with backend.using("triton", "cuda"):
        yield
    torch.use_deterministic_algorithms(False)


def call(op: str, inputs: list[Any]) -> Tensor:
    """The op on arguments of its ragged form; updates take no offsets."""
    run = getattr(kernels, op)
    return run(*inputs[:-2], inputs[-1]) if op in UPDATES else run(*inputs)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def check(op: str, inputs: list[Any]) -> None:
    """Output and named slots within their errors; slots that are not named still hold their NaN."""
    state, slots = inputs[STATE], inputs[-1].long()
    unnamed = torch.ones(len(state), dtype=torch.bool, device="cuda").index_fill(0, slots, False)
    state[unnamed] = torch.nan
    wide = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs]
    with backend.using("reference", "cuda"):
        expected = call(op, wide)
    y = call(op, inputs)
    assert y.dtype == inputs[0].dtype and y.is_contiguous()
    if len(slots) and y.numel():
        assert relative_error(y, expected) < OUTPUT_ERROR[y.dtype]
        assert relative_error(state[slots], wide[STATE][slots]) < STATE_ERROR[state.dtype]
    assert state[unnamed].isnan().all()


@pytest.mark.parametrize("lengths", [[2048], MIXED, [257] * 8, [1]], ids=["one", "mixed", "eight", "token"])
@pytest.mark.parametrize("channels", [5120, 1280])
@pytest.mark.parametrize("op", RAGGED)
def test_ragged_ops_are_their_definitions(op: str, lengths: list[int], channels: int) -> None:
    check(op, make(op, lengths, channels, dtype=torch.bfloat16))


@pytest.mark.parametrize("channels", [1280, 37])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", MAKE)
def test_ops_of_any_dtype_and_odd_channels(op: str, dtype: torch.dtype, channels: int) -> None:
    check(op, make(op, [1] * 12 if op in UPDATES else MIXED, channels, dtype=dtype))


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("channels", [5120, 1280])
@pytest.mark.parametrize("op", UPDATES)
def test_updates_of_few_sequences(op: str, sequences: int, channels: int) -> None:
    check(op, make(op, [1] * sequences, channels, dtype=torch.bfloat16))


@pytest.mark.parametrize("op", UPDATES)
def test_updates_of_many_sequences(op: str) -> None:
    """Configurations for large batches, with slots in any order among unnamed ones."""
    inputs = make(op, [1] * 259, 5120, dtype=torch.bfloat16)[:STATE]
    shape = (300, 3, 5120) if op == "causal_conv_update" else (300, 5120, 16)
    dtype = torch.bfloat16 if op == "causal_conv_update" else torch.float32
    state = torch.randn(shape, dtype=dtype, device="cuda")
    check(op, [*inputs, state, None, torch.randperm(300, device="cuda").int()[:259]])


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("op", ["causal_conv", "causal_conv_update"])
def test_conv_of_any_width_with_and_without_bias(op: str, width: int) -> None:
    lengths = [1] * 5 if op in UPDATES else [1, 2, 100, 0, 3]
    check(op, make(op, lengths, 640, width, torch.bfloat16))
    inputs = make(op, lengths, 640, width, torch.bfloat16)
    inputs[2] = None
    check(op, inputs)


@pytest.mark.parametrize("state", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("channels", "states", "groups"), [(7424, 16, 2), (1856, 16, 1), (384, 8, 3), (96, 32, 2), (96, 64, 1)]
)
@pytest.mark.parametrize("op", ["selective_scan", "selective_state_update"])
def test_groups_states_and_narrow_states(
    op: str, channels: int, states: int, groups: int, state: torch.dtype
) -> None:
    lengths = [1] * 5 if op in UPDATES else [100, 1, 0, 31]
    inputs = make(op, lengths, channels, states, groups, torch.bfloat16)
    check(op, [t.clone() if torch.is_tensor(t) and t is inputs[STATE] else t for t in inputs])
    inputs[STATE] = torch.randn_like(inputs[STATE]).to(state)
    check(op, inputs)


@pytest.mark.parametrize("op", MAKE)
def test_small_shapes_of_every_op(op: str) -> None:
    check(op, make(op, [1] * 3 if op in UPDATES else [3, 0, 20], 10, dtype=torch.bfloat16))


@pytest.mark.parametrize("op", MAKE)
def test_results_are_the_same_from_run_to_run(op: str) -> None:
    inputs = make(op, [1] * 12 if op in UPDATES else [1900, 3, 0, 145], 5120, dtype=torch.bfloat16)
    states = [inputs[STATE].clone() for _ in range(5)]
    outputs = [call(op, [*inputs[:STATE], state, *inputs[-2:]]) for state in states]
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    assert all(torch.equal(s, states[0]) for s in states)


@pytest.mark.parametrize("op", MAKE)
def test_nan_in_a_neighbour_never_leaks(op: str) -> None:
    lengths = [1, 1, 1] if op in UPDATES else [300, 129, 70]
    start, end = offsets_of(lengths).tolist()[1:3]
    inputs = make(op, lengths, 1280, dtype=torch.bfloat16)
    for i in (0,) if op.startswith("causal") else (0, 1, 3, 4, 6):
        inputs[i][start:end] = torch.nan
    slots = inputs[-1].long()
    inputs[STATE][slots[1]] = torch.nan
    y = call(op, inputs)
    assert not y[:start].isnan().any() and not y[end:].isnan().any()
    assert not inputs[STATE][slots[[0, 2]]].isnan().any()


@pytest.mark.parametrize("op", MAKE)
def test_ops_replay_in_a_graph_without_a_word_to_the_host(op: str) -> None:
    inputs = make(op, [1] * 12 if op in UPDATES else [300, 0, 57], 1280, dtype=torch.bfloat16)
    before = inputs[STATE].clone()
    expected = call(op, inputs)
    after = inputs[STATE].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(op, inputs)
    for _ in range(2):
        inputs[STATE].copy_(before)
        graph.replay()
        assert torch.equal(y, expected) and torch.equal(inputs[STATE], after)


@pytest.mark.parametrize("op", MAKE)
def test_ops_compile_whole_with_their_state_in_place(op: str) -> None:
    """The updates by inductor, since decoding is a compiled step; the others as far as the graph."""
    inputs = make(op, [1] * 5, 640, dtype=torch.bfloat16)
    mine = [*inputs[:STATE], inputs[STATE].clone(), *inputs[-2:]]
    expected = call(op, inputs) * 2
    chosen = "inductor" if op in UPDATES else "aot_eager"
    y = torch.compile(lambda *t: call(op, list(t)) * 2, fullgraph=True, backend=chosen)(*mine)
    assert torch.equal(y, expected) and torch.equal(mine[STATE], inputs[STATE])


@pytest.mark.parametrize("op", UPDATES)
def test_slots_beyond_the_reach_of_32_bits(op: str) -> None:
    """The last slot begins past 2**31 numbers."""
    channels = 5120
    each = channels * (3 if op == "causal_conv_update" else 16)
    slots = 2**31 // each + 2
    inputs = make(op, [1, 1], channels, dtype=torch.bfloat16)
    state = torch.empty((slots, *inputs[STATE].shape[1:]), dtype=torch.bfloat16, device="cuda")
    named, first = torch.tensor([[slots - 1, 0], [0, 1]], dtype=torch.int32, device="cuda")
    state[named.long()] = inputs[STATE][:2].to(torch.bfloat16)
    small = inputs[STATE][:2].to(torch.bfloat16).contiguous()
    y = call(op, [*inputs[:STATE], state, inputs[-2], named])
    expected = call(op, [*inputs[:STATE], small, inputs[-2], first])
    assert torch.equal(y, expected) and torch.equal(state[named.long()], small)


@pytest.mark.parametrize("op", RAGGED)
def test_tokens_beyond_the_reach_of_32_bits(op: str) -> None:
    """The last rows of a packed projection begin past 2**31 numbers."""
    channels, far = 64, 2**31 // 40960 + 200
    inputs = make(op, [far - 3, 3], channels, dtype=torch.bfloat16)
    packed = torch.empty(far, 40960, dtype=torch.bfloat16, device="cuda")
    packed[:, :channels] = inputs[0]
    state = inputs[STATE].clone()
    y = call(op, [packed[:, :channels], *inputs[1:]])
    expected = call(op, [inputs[0].contiguous(), *inputs[1:STATE], state, *inputs[-2:]])
    assert torch.equal(y, expected) and torch.equal(inputs[STATE], state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", ["branch", "residual", "both"])
@pytest.mark.parametrize(("rows", "width"), [(1, 2560), (300, 4096), (1000, 7424), (3, 37)])
def test_add_rms_norm_is_its_definition(dtype: torch.dtype, given: str, rows: int, width: int) -> None:
    packed, stream = torch.randn(2, rows, 2 * width, device="cuda")
    branch = packed.to(dtype)[:, :width] if given != "residual" else None
    residual = stream[:, :width].contiguous() if given != "branch" else None
    weight = packed[0, width:].to(dtype)
    for appended in (None, packed.to(dtype)[:, width:]):
        gain = weight if appended is None else torch.cat([weight, weight])
        y, total = kernels.add_rms_norm(branch, residual, gain, 1e-5, appended)
        wide = [None if t is None else t.double() for t in (branch, residual, gain, appended)]
        with backend.using("reference", "cuda"):
            expected, expected_total = kernels.add_rms_norm(wide[0], wide[1], wide[2], 1e-5, wide[3])
        assert (y.dtype, total.dtype) == (dtype, torch.float32)
        assert_close(total.double(), expected_total, rtol=1e-6, atol=1e-6)
        assert relative_error(y, expected) < OUTPUT_ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 256), (300, 256), (1000, 16), (3, 37)])
def test_rms_normalize_is_its_definition(dtype: torch.dtype, rows: int, width: int) -> None:
    packed = torch.randn(rows, 2, width + 32, dtype=dtype, device="cuda")
    for x in (packed[:, 0, :width], packed[..., 32:]):
        with backend.using("reference", "cuda"):
            expected = kernels.rms_normalize(x.double(), 1e-6)
        assert relative_error(kernels.rms_normalize(x, 1e-6), expected) < OUTPUT_ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 7424), (300, 1024), (3, 37)])
def test_gated_gelu_is_its_definition(dtype: torch.dtype, rows: int, width: int) -> None:
    gate, up = (3 * torch.randn(2, rows, width + 16, device="cuda")).to(dtype)[..., :width]
    with backend.using("reference", "cuda"):
        expected = kernels.gated_gelu(gate.double(), up.double())
    assert relative_error(kernels.gated_gelu(gate, up), expected) < OUTPUT_ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 50_280), (1, 65_024), (8, 50_277), (64, 50_280), (256, 65_024), (3, 37), (300, 1)]
)
def test_largest_is_torchs_max(rows: int, width: int, dtype: torch.dtype) -> None:
    """With ties, among them at the top; rows of -inf, of one number and with several NaN; strided rows."""
    packed = (8 * torch.randn(rows, width + 24, device="cuda")).round().clamp(max=24).to(dtype)
    packed[0, width - 1] = 100.0
    packed[1::5, :width] = -torch.inf
    packed[2::5, :width] = 7.0
    packed[3::5, width // 3 : width] = torch.nan
    for logits in (packed[:, :width], packed[:, :width].contiguous(), packed[:, 5 : width + 5], packed[:1]):
        values, ids = kernels.largest(logits)
        expected, expected_ids = torch.max(logits, dim=-1)
        assert torch.equal(ids, expected_ids)
        assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("compiled", [False, True], ids=["as written", "compiled"])
def test_greedy_sampling_replays_in_a_graph(rows: int, compiled: bool) -> None:
    """From slots to the tokens of their next step, right behind each other and behind the head's product."""
    width, nobody = 50_280, 2 * rows
    embedding = torch.randn(width, 256, dtype=torch.bfloat16, device="cuda")
    head = torch.randn(width, 256, dtype=torch.bfloat16, device="cuda")
    slots = torch.randperm(2 * rows, device="cuda")[:rows]
    last_token = torch.randint(0, width, (2 * rows + 1,), device="cuda")
    last_place = torch.arange(2 * rows + 1, device="cuda")

    def step(slots: Tensor) -> Tensor:
        tokens, _, next_places, _ = kernels.load_last(last_token, last_place, slots)
        _, ids = kernels.largest(kernels.linear(embedding[tokens], head)[:, : width - 3])
        kernels.store_last(last_token, last_place, slots, ids, next_places, nobody)
        return ids

    run = torch.compile(step, fullgraph=True, dynamic=True) if compiled else step
    before = last_token.clone()
    run(slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = run(slots)
    last_token.copy_(before)
    last_place.copy_(torch.arange(2 * rows + 1))
    for turn in range(1, 20):
        logits = kernels.linear(embedding[last_token[slots]], head)[:, : width - 3]
        graph.replay()
        assert torch.equal(ids, logits.max(dim=-1).indices)
        assert torch.equal(last_token[slots], ids) and torch.equal(last_place[slots], slots + turn)
    unnamed = torch.ones_like(last_token, dtype=torch.bool).index_fill(0, slots, False)
    assert torch.equal(last_token[unnamed], before[unnamed])


ATTENTIONS = [
    ("decode", [1] * 5, [0, 1, 700, 15, 4100], 2, 464),
    ("one", [1], [4095], 16, 464),
    ("prefill", [300, 1, 0, 70], [0, 33, 5, 500], 2, 464),
    ("small", [3, 1, 20], [5, 0, 7], 2, 58),
    ("wide", [40], [100], 4, 128),
    ("chunks", [200, 64, 1, 129], [64, 0, 3, 1000], 3, 464),
    ("odd", [70, 65], [0, 200], 5, 40),
    ("narrow", [70, 65], [0, 200], 5, 48),
    ("between", [90], [300], 2, 256),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "before", "heads", "size"), [a[1:] for a in ATTENTIONS], ids=[a[0] for a in ATTENTIONS]
)
def test_attention_is_its_definition(
    lengths: list[int], before: list[int], heads: int, size: int, dtype: torch.dtype
) -> None:
    """Everything that is not to be read is NaN."""
    with torch.device("cuda"):
        inputs = attention_inputs(lengths, before, heads, size, 16, dtype)
    wide = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs]
    with backend.using("reference", "cuda"):
        expected = kernels.paged_attention(*wide)
    y = kernels.paged_attention(*inputs)
    assert relative_error(y, expected) < OUTPUT_ERROR[dtype]
    for mine, theirs in zip(inputs[3:5], wide[3:5], strict=True):
        assert torch.equal(mine.nan_to_num(), theirs.to(dtype).nan_to_num())


@pytest.mark.skipif(
    any(importlib.util.find_spec(p) is None for p in ("mamba_ssm", "causal_conv1d")), reason="not installed"
)
@pytest.mark.parametrize("op", UPDATES)
@pytest.mark.parametrize("channels", [5120, 1280])
def test_mamba_ssm_agrees(op: str, channels: int) -> None:
    with backend.using("mamba_ssm", "cuda"):
        assert backend.implementation(op) is not backend.implementation("causal_conv")
        check(op, make(op, [1] * 12, channels, dtype=torch.bfloat16))


@pytest.mark.parametrize(("rows", "width"), [(64, 2560), (5, 37)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("codec", "group_size"), QUANTISED, ids=str)
def test_error_feedback_has_the_bits_of_its_definition(
    codec: str, group_size: int, dtype: torch.dtype, rows: int, width: int
) -> None:
    layout = (width, dtype, codec, group_size)
    x = (torch.randn(3, rows, width, device="cuda") * 10.0 ** torch.linspace(-4, 3, width).cuda()).to(dtype)
    x[1] = (127 * torch.rand(rows, width, device="cuda")).round() / 2  # ties
    error = (0.1 * x[2]).to(dtype)

    def results() -> list[Tensor]:
        parts = torch.stack([encode_rows(part, codec, group_size, rows) for part in x])
        found = []
        for before in (error, None):
            encoded, left = encode_rows_with_feedback(x[1], before, codec, group_size, rows)
            total, of_sum = sum_rows_with_feedback(parts, before, *layout)
            found += [decode_rows(encoded, *layout), left, decode_rows(total, *layout), of_sum]
        return found

    ours = results()
    with backend.using("reference", "cuda"):
        theirs = results()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
