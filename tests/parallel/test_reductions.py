"""Quantised reductions over gloo: analytic bounds, the same bits on all ranks, any shape, clear failures."""

import pytest
import torch
from torch import Tensor

from tests.kernels.codec_bounds import CODECS, QUANTISED, reduction_bound, sum_by_codec_ops
from tests.parallel.reductions_on_ranks import (
    INPUTS,
    Case,
    check_ops,
    compiled_and_eager,
    fused_and_apart,
    spent_sums,
    split_residual,
    stream_made_whole,
    strided_sum,
    sums,
    traced_with_shared_memory,
)
from tests.ranks import RankError, run_on_ranks

each_codec = pytest.mark.parametrize(("codec", "group_size"), CODECS, ids=str)
each_degree = pytest.mark.parametrize("degree", [1, 2, 3, 4, 6, 8])

FINITE = [kind for kind in INPUTS if kind not in ("nan", "infinite")]
SHAPES = [(1, 1), (1, 64), (3, 37), (5, 300), (255, 33)]


def parts_of(case: Case, ranks: range) -> Tensor:
    return torch.stack([case.part(rank) for rank in ranks])


def check(case: Case, outputs: list[Tensor], ranks: range) -> None:
    """All ranks hold the same bits, and they are right."""
    for output in outputs:
        assert output.dtype == case.dtype
        assert torch.equal(output, outputs[0])
    parts = parts_of(case, ranks)
    error = (outputs[0].double() - parts.double().sum(0)).abs()
    if len(ranks) > 1:
        assert (error <= reduction_bound(parts, case.codec, case.group_size, case.dtype)).all(), case
    else:
        assert not error.any()


@each_degree
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_codec
def test_sums_are_within_the_codecs_bound_and_the_same_on_all_ranks(
    codec: str, group_size: int, dtype: torch.dtype, degree: int
) -> None:
    cases = [Case(kind, 3, 37, dtype, codec, group_size, "exchange") for kind in FINITE]
    cases += [Case("normal", *shape, dtype, codec, group_size, "exchange") for shape in SHAPES]
    outputs = run_on_ranks(degree, sums, cases)
    for case, by_rank in zip(cases, zip(*outputs, strict=True), strict=True):
        check(case, list(by_rank), range(degree))


@pytest.mark.parametrize("degree", [2, 3])
@each_codec
def test_the_bits_are_those_of_the_codec_ops(codec: str, group_size: int, degree: int) -> None:
    """Every part but the owner's encoded; the sum in rank order, encoded, and decoded by the owner, too."""
    case = Case("scaled", 7, 45, torch.bfloat16, codec, group_size, "exchange")
    expected = sum_by_codec_ops(parts_of(case, range(degree)), codec, group_size)
    assert torch.equal(run_on_ranks(degree, sums, [case])[0][0], expected)


@pytest.mark.parametrize(("degree", "span"), [(4, 2), (6, 3), (8, 4)])
@each_codec
def test_subgroups_sum_among_themselves(codec: str, group_size: int, degree: int, span: int) -> None:
    case = Case("normal", 3, 37, torch.bfloat16, codec, group_size)
    outputs = [output for (output,) in run_on_ranks(degree, sums, [case], span)]
    for first in range(0, degree, span):
        ranks = range(first, first + span)
        if codec != "none":
            check(case, outputs[first : first + span], ranks)
        assert all(torch.equal(outputs[rank], outputs[first]) for rank in ranks)


@pytest.mark.parametrize("algorithm", ["auto", "exchange"])
@pytest.mark.parametrize("kind", ["nan", "infinite"])
@each_codec
def test_what_is_no_number_stays_none_in_its_group(
    codec: str, group_size: int, kind: str, algorithm: str
) -> None:
    case = Case(kind, 4, 300, torch.bfloat16, codec, group_size, algorithm)
    reach = 1 if codec == "none" else group_size
    for (output,) in run_on_ranks(3, sums, [case]):
        lost = torch.zeros(4, 300, dtype=torch.bool)
        lost[-1, :reach] = True
        assert torch.equal(~output.isfinite(), lost)


@each_codec
def test_a_strided_input_is_taken_and_left_alone(codec: str, group_size: int) -> None:
    case = Case("normal", 5, 70, torch.bfloat16, codec, group_size)
    assert run_on_ranks(2, strided_sum, case) == [(True, True)] * 2


def test_memory_that_nobody_needs_holds_an_exact_sum_of_the_process_group() -> None:
    assert run_on_ranks(2, spent_sums) == [[(True, True), (False, True), (False, True)]] * 2


@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "first"])
@pytest.mark.parametrize("degree", [1, 2, 4])
@each_codec
def test_the_fused_op_is_the_sum_then_the_norm(
    codec: str, group_size: int, degree: int, with_residual: bool
) -> None:
    case = Case("normal", 3, 70, torch.bfloat16, codec, group_size)
    results = run_on_ranks(degree, fused_and_apart, case, with_residual)
    for y, total, same in results:
        assert same and y.dtype == torch.bfloat16 and total.dtype == torch.float32
        assert torch.equal(y, results[0][0]) and torch.equal(total, results[0][1])


@pytest.mark.parametrize(("degree", "rows"), [(2, 6), (3, 7), (4, 2)])
@pytest.mark.parametrize(("codec", "error"), [("none", 1e-6), ("int8", 0.02), ("fp8", 0.1), ("int4", 0.5)])
def test_a_residual_that_stays_split_gives_the_same_norms(
    codec: str, error: float, degree: int, rows: int
) -> None:
    """But for roundings: of the sum before the residual is added, or of the norm after it."""

    def relative(actual: Tensor, expected: Tensor) -> float:
        return float((actual - expected).norm() / expected.norm().clamp(min=1e-9))

    case = Case("normal", rows, 70, torch.float32, codec, 32, "exchange")
    results = run_on_ranks(degree, split_residual, case)
    for split, whole, stripe, own in results:
        assert torch.equal(split, results[0][0])
        assert relative(split, whole) < error and relative(stripe, own) < error


@pytest.mark.parametrize(("degree", "rows"), [(2, 6), (3, 7), (4, 6)])
def test_a_split_residual_becomes_whole_where_more_columns_are_normed_with_it(degree: int, rows: int) -> None:
    results = run_on_ranks(degree, stream_made_whole, rows)
    for split, then, whole, expected in results:
        assert torch.equal(split, results[0][0]) and torch.equal(then, results[0][1])
        torch.testing.assert_close((split, then), (whole, expected), atol=1e-5, rtol=1e-5)


def test_ops_pass_torchs_own_checks() -> None:
    run_on_ranks(2, check_ops)


@pytest.mark.parametrize("codec", ["none", "int8", "fp8", "int4"])
def test_a_compiled_step_is_one_graph_around_its_reductions(codec: str) -> None:
    results = run_on_ranks(2, compiled_and_eager, codec)
    for compiled, eager in results:
        torch.testing.assert_close(compiled, eager)
        assert torch.equal(compiled, results[0][0])


def test_how_a_sum_travels_is_decided_while_tracing() -> None:
    """By a guard on the number of tokens: two graphs serve four numbers, each of them whole."""
    calls, graphs = run_on_ranks(2, traced_with_shared_memory)[0]
    assert (calls, graphs) == (["tp_all_reduce_add_rms_norm", "tp_all_reduce_add_rms_norm_split"], 2)


@pytest.mark.parametrize(("codec", "group_size"), QUANTISED, ids=str)
def test_integers_have_no_codec(codec: str, group_size: int) -> None:
    with pytest.raises(RankError, match=r"takes float32, bfloat16 or float16, not torch\.int32"):
        run_on_ranks(2, sums, [Case("zeros", 2, 3, torch.int32, codec, group_size)])
