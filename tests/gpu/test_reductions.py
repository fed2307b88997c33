"""Reductions on GPUs: right sums, the same bits on all ranks, over every path, in graphs, out of step.

The ranks of a degree are started once; before that, other processes compile the kernels, a share each.
"""

import os
import warnings
from collections.abc import Iterator

import pytest
import torch

from tests.gpu import reductions_on_gpus as on_gpus
from tests.gpu.reductions_on_gpus import SHORT
from tests.kernels.codec_bounds import CODECS, QUANTISED
from tests.parallel.reductions_on_ranks import Case
from tests.ranks import RankError, run_on_ranks

GPUS = torch.cuda.device_count()
DEGREES = [n for n in (2, 4) if n <= GPUS]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")]

each_degree = pytest.mark.parametrize(
    "degree", [pytest.param(n, marks=pytest.mark.skipif(n > GPUS, reason=f"needs {n} GPUs")) for n in (2, 4)]
)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
EXACT_WAYS = ["all_reduce", "exchange", "one_shot", "two_shot", "bulk"]
CODED_WAYS = ["exchange", "bulk"]
KINDS = ["normal", "zeros", "constant", "outlier", "scaled", "largest"]
SHAPES = [(1, 8), (1, 192), (3, 264), (64, 288), (1, 2560), (255, 2560), (256, 4096), (3, 37), (9000, 2560)]
"""Odd widths, few and many rows; the last is more than the shared memory holds at once."""
NORM_SHAPES = [(1, 2560), (8, 4096), (256, 2560), (3, 264)]
NORM_WAYS = ["all_reduce", "one_shot", "two_shot", "bulk"]
NORM_ERRORS = {"none": 0.006, "int8": 0.02, "fp8": 0.06, "int4": 0.3}
"""Of the norm with a split residual, relative."""
REPLAYED = [
    Case("normal", 1, 2560, BF16, "none", 128, "one_shot"),
    Case("normal", 64, 2560, BF16, "none", 128, "two_shot"),
    Case("normal", 512, 2560, BF16, "none", 128, "bulk"),
    Case("normal", 512, 2560, BF16, "int8", 128, "bulk"),
]

PRODUCTS = [
    (1, 2560, 2560, BF16), (1, 192, 2560, BF16), (4, 288, 4096, F16), (1, 1024, 1856, F32),
    (4, 512, 512, F32), (8, 2560, 2560, BF16), (8, 192, 2560, BF16), (8, 2560, 1280, F16),
    (20, 192, 2560, F16), (32, 2560, 2560, BF16), (40, 288, 4096, BF16), (64, 192, 2560, BF16),
]  # fmt: skip
"""Rows, outputs, inputs and dtype: of one kernel for few rows, then of two for more."""


def exact_cases(way: str, dtype: torch.dtype) -> list[Case]:
    """All shapes in bfloat16; of the other dtypes, one of every kind of code."""
    kinds = KINDS if dtype != F16 else ["normal", "zeros", "constant"]  # the others overflow
    cases = [Case(kind, 5, 2560, dtype, "none", 128, way) for kind in kinds]
    shapes = SHAPES if dtype == BF16 else [(1, 192), (255, 2560), (3, 37)]
    return cases + [Case("normal", *shape, dtype, "none", 128, way) for shape in shapes]


def coded_cases(way: str, codec: str, group_size: int) -> list[Case]:
    cases = [Case(kind, 5, 2560, BF16, codec, group_size, way) for kind in KINDS]
    shapes = [(1, 64), (3, 37), (255, 300), (4096, 2560)]
    return cases + [Case("normal", *shape, BF16, codec, group_size, way) for shape in shapes]


def broken_cases(way: str, kind: str) -> list[Case]:
    codecs = CODECS if way in CODED_WAYS else CODECS[:1]
    return [Case(kind, 4, 2560, BF16, codec, size, way) for codec, size in codecs]


def codec_cases(codec: str, group_size: int) -> list[Case]:
    shapes = [(64, 2560, BF16), (5, 37, BF16), (64, 2560, F32), (1, 1, F32)]
    return [Case("normal", *shape, codec, group_size) for shape in shapes]


def all_kernels() -> list[tuple[str, Case]]:
    """Whatever the tests below call, for `compile_share`; few rows do where the code is the same."""
    sums = [case for way in EXACT_WAYS for dtype in (BF16, F16, F32) for case in exact_cases(way, dtype)]
    for codec, size in QUANTISED:
        sums += [case for way in CODED_WAYS for case in coded_cases(way, codec, size)]
        sums += [
            Case("normal", c.rows, c.width, c.dtype, codec, size, "exchange")
            for c in codec_cases(codec, size)
        ]
    norms = [Case("normal", *shape, BF16, "none", 128, way) for way in NORM_WAYS for shape in NORM_SHAPES]
    splits = [Case("normal", 37, 2560, BF16, codec, 32, "bulk") for codec in NORM_ERRORS]
    found = [("sum", case) for case in sums] + [("norm", case) for case in norms + REPLAYED]
    found += [("split", case) for case in splits]
    return [(kind, case) for kind, case in dict.fromkeys(found) if case.kind == "normal"]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> Iterator[None]:
    """Kernels take a second each to compile: all of them, in as many processes as there are cores for."""
    workers = max(1, min(12, len(os.sched_getaffinity(0)) // 2))
    try:
        for degree in DEGREES:
            run_on_ranks(workers, on_gpus.compile_share, degree, all_kernels())
    except RankError as error:  # then the ranks compile for themselves, which takes longer
        warnings.warn(f"compiling ahead failed: {error}", stacklevel=1)
    yield


def check(degree: int, cases: list[Case]) -> None:
    for rank, found in enumerate(run_on_ranks(degree, on_gpus.verdicts, cases, device="cuda")):
        for case, verdict in zip(cases, found, strict=True):
            assert verdict.same and verdict.excess <= 0 and verdict.misplaced == 0, (rank, case, verdict)


@each_degree
def test_memory_is_shared(degree: int) -> None:
    assert run_on_ranks(degree, on_gpus.peer_access, device="cuda") == ["shared memory and nccl"] * degree


@each_degree
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("way", EXACT_WAYS)
def test_exact_sums(way: str, dtype: torch.dtype, degree: int) -> None:
    check(degree, exact_cases(way, dtype))


@each_degree
@pytest.mark.parametrize("way", CODED_WAYS)
@pytest.mark.parametrize(("codec", "group_size"), QUANTISED, ids=str)
def test_quantised_sums_are_within_the_codecs_bound(
    codec: str, group_size: int, way: str, degree: int
) -> None:
    check(degree, coded_cases(way, codec, group_size))


@each_degree
@pytest.mark.parametrize("kind", ["nan", "infinite"])
@pytest.mark.parametrize("way", EXACT_WAYS)
def test_what_is_no_number_stays_none_in_its_group(way: str, kind: str, degree: int) -> None:
    check(degree, broken_cases(way, kind))


@each_degree
@pytest.mark.parametrize(("codec", "group_size"), CODECS, ids=str)
def test_long_messages_have_the_bits_of_the_exchange(codec: str, group_size: int, degree: int) -> None:
    case = Case("normal", 300, 2560, BF16, codec, group_size)
    assert all(run_on_ranks(degree, on_gpus.exchanged_and_bulk, case, device="cuda"))


@each_degree
@pytest.mark.parametrize("way", EXACT_WAYS)
def test_a_strided_input_is_taken(way: str, degree: int) -> None:
    case = Case("normal", 5, 2560, BF16, "none", 128, way)
    assert all(run_on_ranks(degree, on_gpus.strided, case, device="cuda"))


@each_degree
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
@pytest.mark.parametrize("way", NORM_WAYS)
def test_the_norm_of_the_sum(way: str, shape: tuple[int, int], degree: int) -> None:
    case = Case("normal", *shape, BF16, "none", 128, way)
    for same, error, stream_error in run_on_ranks(degree, on_gpus.norms, case, False, device="cuda"):
        assert same and error < 0.006 and stream_error < 0.004


@each_degree
@pytest.mark.parametrize("rows", [2, 37, 1024])
@pytest.mark.parametrize(("codec", "most"), NORM_ERRORS.items())
def test_the_norm_with_a_split_residual(codec: str, most: float, rows: int, degree: int) -> None:
    case = Case("normal", rows, 2560, BF16, codec, 32, "bulk")
    for same, error, stream_error in run_on_ranks(degree, on_gpus.norms, case, True, device="cuda"):
        assert same and error < most and stream_error < most


@pytest.mark.parametrize(("codec", "group_size"), CODECS, ids=str)
def test_triton_codecs_have_the_bits_of_torchao(codec: str, group_size: int) -> None:
    found = run_on_ranks(2, on_gpus.codec_bits, codec_cases(codec, group_size), device="cuda")
    assert found == [[], []]


@each_degree
@pytest.mark.parametrize(("codec", "group_size"), QUANTISED, ids=str)
def test_sums_with_error_feedback_have_the_bits_of_the_codec_ops(
    codec: str, group_size: int, degree: int
) -> None:
    case = Case("normal", 64, 2560, BF16, codec, group_size)
    assert run_on_ranks(degree, on_gpus.fed_back, case, 5, device="cuda") == [0] * degree


@each_degree
@pytest.mark.parametrize("case", REPLAYED, ids=lambda case: f"{case.algorithm}-{case.codec}")
def test_a_thousand_replays_with_new_inputs(case: Case, degree: int) -> None:
    assert run_on_ranks(degree, on_gpus.replays, case, 1000, device="cuda") == [0] * degree


@each_degree
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_linear_layers_that_push(shape: tuple[int, int, int, torch.dtype], degree: int) -> None:
    assert run_on_ranks(degree, on_gpus.replayed_products, *shape, 1000, device="cuda") == [0] * degree


@each_degree
def test_ten_thousand_calls_of_changing_sizes_out_of_step(degree: int) -> None:
    assert run_on_ranks(degree, on_gpus.skewed, 10_000, device="cuda") == [0] * degree


@each_degree
def test_groups_of_some_ranks_share_memory_of_their_own(degree: int) -> None:
    assert run_on_ranks(degree, on_gpus.parts_of_the_ranks, 300, device="cuda") == [0] * degree


@each_degree
def test_what_does_not_fit_goes_another_way(degree: int) -> None:
    for carried, values in run_on_ranks(degree, on_gpus.fallback, device="cuda"):
        assert carried == "shared memory and nccl"
        assert values == [degree * (degree + 1) / 2, degree, degree]


def test_a_rank_that_stays_away_is_named_in_time() -> None:
    ways = [*SHORT, "bulk"]
    messages, none = run_on_ranks(2, on_gpus.alone, 1, ways, device="cuda", timeout=60.0)
    assert len(messages) == 3 and none == []
    for way, message in zip(ways, messages, strict=True):
        assert f"{way} over shared memory got nothing from rank 1 for 2.5 s" in message
        assert "Missing: rank 1 of 2" in message and "timeout_seconds" in message
