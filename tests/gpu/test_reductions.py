"""Reductions on GPUs: right sums, the same bits on all ranks, over every path, in graphs, out of step."""

import pytest
import torch
from torch import Tensor

from tests.gpu import reductions_on_gpus as on_gpus
from tests.kernels.codec_bounds import CODECS, reduction_bound
from tests.parallel.reductions_on_ranks import Case
from tests.ranks import run_on_ranks

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")]

each_degree = pytest.mark.parametrize(
    "degree", [pytest.param(n, marks=pytest.mark.skipif(n > GPUS, reason=f"needs {n} GPUs")) for n in (2, 4)]
)
KINDS = ["normal", "zeros", "constant", "outlier", "scaled", "largest"]
EXACT_WAYS = ["all_reduce", "exchange", "one_shot", "two_shot", "bulk"]
CODED_WAYS = ["exchange", "bulk"]


def check(case: Case, outputs: list[Tensor]) -> None:
    parts = torch.stack([case.part(rank) for rank in range(len(outputs))])
    for output in outputs:
        same = torch.equal(output.nan_to_num(nan=1e30), outputs[0].nan_to_num(nan=1e30))
        assert same and output.dtype == case.dtype, case
    error = (outputs[0].double() - parts.double().sum(0)).abs()
    bound = reduction_bound(parts, case.codec, case.group_size, case.dtype)
    if case.codec == "none":  # NCCL and a two-shot round on the way
        bound = bound + len(parts) * torch.finfo(case.dtype).eps * parts.double().abs().sum(0)
    assert (error <= bound).all(), (case, float((error - bound).max()))


def run(degree: int, cases: list[Case]) -> None:
    for case, outputs in zip(
        cases, zip(*run_on_ranks(degree, on_gpus.sums, cases, device="cuda"), strict=True), strict=True
    ):
        check(case, list(outputs))


@each_degree
def test_memory_is_shared(degree: int) -> None:
    assert run_on_ranks(degree, on_gpus.peer_access, device="cuda") == ["shared memory and nccl"] * degree


@each_degree
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("way", EXACT_WAYS)
def test_exact_sums(way: str, dtype: torch.dtype, degree: int) -> None:
    kinds = [kind for kind in KINDS if dtype != torch.float16 or kind not in ("largest", "outlier", "scaled")]
    cases = [Case(kind, 5, 2560, dtype, "none", 128, way) for kind in kinds]
    shapes = [
        (1, 8),
        (1, 192),
        (3, 264),
        (64, 288),
        (1, 2560),
        (255, 2560),
        (256, 4096),
        (3, 37),
        (1000, 2560),
    ]
    run(degree, cases + [Case("normal", *shape, dtype, "none", 128, way) for shape in shapes])


@each_degree
@pytest.mark.parametrize("way", CODED_WAYS)
@pytest.mark.parametrize(("codec", "group_size"), CODECS[1:], ids=str)
def test_quantised_sums_are_within_the_codecs_bound(
    codec: str, group_size: int, way: str, degree: int
) -> None:
    cases = [Case(kind, 5, 2560, torch.bfloat16, codec, group_size, way) for kind in KINDS]
    shapes = [(1, 64), (3, 37), (255, 300), (4096, 2560)]
    run(degree, cases + [Case("normal", *shape, torch.bfloat16, codec, group_size, way) for shape in shapes])


@each_degree
@pytest.mark.parametrize(("codec", "group_size"), CODECS, ids=str)
def test_long_messages_have_the_bits_of_the_exchange(codec: str, group_size: int, degree: int) -> None:
    cases = [Case("normal", 300, 2560, torch.bfloat16, codec, group_size, way) for way in CODED_WAYS]
    for exchanged, bulk in run_on_ranks(degree, on_gpus.sums, cases, device="cuda"):
        assert torch.equal(exchanged, bulk)


@each_degree
@pytest.mark.parametrize("kind", ["nan", "infinite"])
@pytest.mark.parametrize("way", EXACT_WAYS)
def test_what_is_no_number_stays_none(way: str, kind: str, degree: int) -> None:
    codecs = CODECS if way in CODED_WAYS else CODECS[:1]
    cases = [Case(kind, 4, 512, torch.bfloat16, codec, size, way) for codec, size in codecs]
    for outputs in run_on_ranks(degree, on_gpus.sums, cases, device="cuda"):
        for case, output in zip(cases, outputs, strict=True):
            reach = 1 if case.codec == "none" else case.group_size
            assert not output[-1, :reach].isfinite().any()
            assert output[:-1].isfinite().all() and output[-1, reach:].isfinite().all()


@each_degree
@pytest.mark.parametrize("shape", [(1, 2560), (8, 4096), (256, 2560), (3, 264)], ids=str)
@pytest.mark.parametrize("way", ["all_reduce", "one_shot", "two_shot", "bulk"])
def test_the_norm_of_the_sum(way: str, shape: tuple[int, int], degree: int) -> None:
    case = Case("normal", *shape, torch.bfloat16, "none", 128, way)
    results = run_on_ranks(degree, on_gpus.norms, case, False, device="cuda")
    for y, stream, expected, expected_stream in results:
        assert torch.equal(y, results[0][0]) and torch.equal(stream, results[0][1])
        assert (y.double() - expected).norm() < 0.006 * expected.norm()
        assert (stream.double() - expected_stream).norm() < 0.004 * expected_stream.norm()


@each_degree
@pytest.mark.parametrize("rows", [2, 37, 1024])
@pytest.mark.parametrize(("codec", "error"), [("none", 0.006), ("int8", 0.02), ("fp8", 0.06), ("int4", 0.3)])
def test_the_norm_with_a_split_residual(codec: str, error: float, rows: int, degree: int) -> None:
    case = Case("normal", rows, 2560, torch.bfloat16, codec, 32, "bulk")
    results = run_on_ranks(degree, on_gpus.norms, case, True, device="cuda")
    for y, stripe, expected, expected_stripe in results:
        assert torch.equal(y, results[0][0])
        assert (y.double() - expected).norm() < error * expected.norm()
        assert (stripe.double() - expected_stripe).norm() < error * expected_stripe.norm().clamp(min=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 37), (64, 2560)])
@pytest.mark.parametrize(("codec", "group_size"), CODECS, ids=str)
def test_triton_codecs_have_the_bits_of_torchao(
    codec: str, group_size: int, rows: int, width: int, dtype: torch.dtype
) -> None:
    args = (codec, group_size, rows, width, dtype)
    assert run_on_ranks(2, on_gpus.codec_bits, *args, device="cuda") == [[], []]


@each_degree
@pytest.mark.parametrize(
    ("algorithm", "codec", "rows"),
    [("one_shot", "none", 1), ("two_shot", "none", 64), ("bulk", "none", 512), ("bulk", "int8", 512)],
)
def test_a_thousand_replays_with_new_inputs(algorithm: str, codec: str, rows: int, degree: int) -> None:
    assert run_on_ranks(degree, on_gpus.replays, algorithm, codec, rows, 1000, device="cuda") == [0] * degree


@each_degree
def test_ten_thousand_calls_of_changing_sizes_out_of_step(degree: int) -> None:
    assert run_on_ranks(degree, on_gpus.skewed, 10_000, device="cuda") == [0] * degree


@each_degree
def test_what_does_not_fit_goes_another_way(degree: int) -> None:
    for carried, values in run_on_ranks(degree, on_gpus.fallback, device="cuda"):
        assert carried == "shared memory and nccl"
        assert values.tolist() == [degree * (degree + 1) / 2] * 111 + [degree] * 10


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot", "bulk"])
def test_a_rank_that_stays_away_is_named_in_time(algorithm: str) -> None:
    messages = run_on_ranks(2, on_gpus.alone, 1, algorithm, device="cuda", timeout=60.0)
    assert f"{algorithm} over shared memory got nothing from rank 1 for 2 s" in messages[0]
    assert "Missing: rank 1 of 2" in messages[0] and "timeout_seconds" in messages[0]
