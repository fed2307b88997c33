"""The benchmark: its arithmetic, and what it says of cases that cannot run."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from ssm_dist import Config, UserError
from ssm_dist.benchmark.breakdown import Profile, is_reduction, own_times, profile_of_gpu
from ssm_dist.benchmark.cases import Case, cases_of, parse_case
from ssm_dist.benchmark.floors import decode_bytes, flop_a_token
from ssm_dist.benchmark.page import page
from ssm_dist.benchmark.program import run_benchmark
from ssm_dist.benchmark.timing import Sample, quantiles
from ssm_dist.build import build_meta, open_source
from ssm_dist.config import BenchmarkConfig
from ssm_dist.parallel import resolve_plan
from ssm_dist.provenance import command
from tests.engine.benchmarks import configuration, measured
from tests.ranks import run_on_ranks


def test_a_case_reports_rates_that_follow_from_its_times():
    asked = {"batches": [1, 2], "prompt_tokens": [5, 40], "new_tokens": 4, "repeats": 3, "warmup": 1}
    report, saved = measured(configuration("mamba-tiny", cases=["2x40+1"], **asked))
    cases = report["cases"]
    assert [(c["batch"], c["prompt_tokens"], c["new_tokens"]) for c in cases] == [
        (1, 5, 4), (1, 40, 4), (2, 5, 4), (2, 40, 4), (2, 40, 1),
    ]  # fmt: skip
    assert saved == len(cases)
    for case in cases:
        prefill, tokens = case["prefill_seconds"], case["batch"] * case["prompt_tokens"]
        assert sorted(prefill["all"])[1] == prefill["median"] and len(prefill["all"]) == 3
        assert case["prefill_tokens_per_second"] == pytest.approx(tokens / prefill["median"], abs=0.1)
        assert case["first_token_ms"]["median"] <= case["first_token_ms"]["p99"]
    for case in cases[:-1]:
        seconds, step = case["request_seconds"]["median"], case["decode_ms_a_step"]
        assert case["output_tokens_per_second"] == pytest.approx(4 * case["batch"] / seconds, abs=0.1)
        assert 0 < 3 * step < 1e3 * seconds
        assert case["decode_tokens_per_second"] == pytest.approx(1e3 * case["batch"] / step, rel=1e-3)
    assert "decode_ms_a_step" not in cases[-1]
    text = page([report], None)
    assert all(f"| {case} |" in text for case in ("1x5+4", "2x40+1"))


def test_a_decode_step_is_timed_where_all_sequences_take_part():
    # the second prompt is read while the first one waits; then steps of 2 s, and the first one ends earlier
    sample = Sample(21.0, [[1.0, 12.0, 14.0, 16.0], [10.0, 12.1, 14.1, 16.1, 18.1]])
    assert sample.decode_step == (16.0 - 10.0) / 3
    assert Sample(3.0, [[1.0, 2.0], [3.0, 4.0]]).decode_step is None


def test_the_99th_percentile_is_of_the_sample():
    assert quantiles([i / 1e3 for i in range(1, 201)]) == {"median": 100.5, "p99": 198.0}
    assert quantiles([2.0]) == {"median": 2000.0, "p99": 2000.0}


def released(name: str, degree: int = 1) -> Any:
    """As much of an engine as the floors look at, without weights."""
    config = Config.model_validate({"model": {"preset": name}, "parallel": {"tensor": degree}})
    source = open_source(config, "cuda")
    model = build_meta(source)
    plan = resolve_plan(model, source.spec.plan, degree)
    loaded = SimpleNamespace(
        plan=plan, config=source.config, dtype=source.dtype, state_dtype=torch.float32
    )  # fmt: skip
    return SimpleNamespace(loaded=loaded, model=model, config=config)


@pytest.mark.parametrize(
    ("name", "gigabytes", "gigaflop"),
    [("mamba-2.8b", 5.54, 5.29), ("falcon-mamba-7b", 14.0, 13.5), ("zamba-7b", 23.1, 22.8)],
)
def test_the_floors_of_a_token_are_those_of_the_released_models(name, gigabytes, gigaflop):
    # bytes: every weight once, falcon-mamba's embedding apart, zamba's shared block at each of 13 calls;
    # operations: 2 for each of those, head and vectors apart
    llm = released(name)
    assert decode_bytes(llm, 0, 0) / 1e9 == pytest.approx(gigabytes, rel=0.01)
    assert flop_a_token(llm) / 1e9 == pytest.approx(gigaflop, rel=0.01)
    half = released(name, degree=2)
    assert decode_bytes(half, 0, 0) / decode_bytes(llm, 0, 0) == pytest.approx(0.5, abs=0.01)


def test_the_operations_of_a_small_model_are_those_of_its_matrices():
    layer = 2 * (2 * 128 * 64 + 128 * 4 + 128 * 36 + 128 * 4 + 64 * 128 + 128 * 16)
    assert flop_a_token(released("mamba-tiny")) == 2 * layer


def test_cases_that_do_not_fit_give_their_reasons_and_the_rest_runs():
    grid = {"batches": [1], "prompt_tokens": [8, 500], "new_tokens": 2, "cases": ["3x8+2", "2x40+1"]}
    report, _ = measured(configuration("zamba-tiny", max_tokens=64, breakdown=True, **grid))
    short, long, many, wide = report["cases"]
    assert short["decode_ms_a_step"] > 0 and "prefill_breakdown" in short
    assert "512 tokens" in long["error"] and "max_tokens is 64" in long["error"]
    assert "3 sequences" in many["error"] and "max_sequences is 2" in many["error"]
    assert "96 tokens" in wide["error"]
    assert "### Cases that did not run" in page([report], None)


def test_codecs_run_one_after_the_other_on_the_ranks_and_say_what_reductions_take():
    grid = {"cases": ["2x4+2"], "models": ["mamba-tiny"], "codecs": ["none", "int8"], "breakdown": True}
    config = configuration("falcon-mamba-tiny", 2, backends=["reference"], **grid)
    (report, saved), (other, _) = run_on_ranks(2, measured, config)
    assert [(c["model"], c["codec"]) for c in report["cases"]] == [
        ("mamba-tiny", "none"),
        ("mamba-tiny", "int8"),
    ]
    assert len(other["cases"]) == 2 and saved == 2 * 2
    for case in report["cases"]:
        assert case["degree"] == 2 and case["kernels"] == "reference" and case["codec"] in case["reductions"]
        assert case["prefill_breakdown"]["reduction_ms"] > 0 and case["decode_breakdown"]["reduction_ms"] > 0
        names = {kernel["name"] for kernel in case["decode_breakdown"]["longest"]}
        assert "gloo:all_reduce" in names
    assert "| 2x4+2 | ssm-dist, int8 | 2 |" in page([report], None)


def test_a_preset_that_does_not_exist_is_reported_among_others_and_raises_alone():
    report, _ = measured(configuration("mamba-tiny", cases=["1x4+1"], models=["mamba-tinier", "mamba-tiny"]))
    assert "mamba-tinier" in report["cases"][0]["error"] and "error" not in report["cases"][1]
    with pytest.raises(UserError, match="mamba-tinier"):
        run_benchmark(configuration("mamba-tinier", cases=["1x4+1"]))


def test_prompts_that_would_be_known_after_the_first_run_are_refused():
    config = configuration("mamba-tiny", cases=["1x4+1"])
    cache = config.cache.model_copy(update={"prefix_device_bytes": 1 << 20})
    with pytest.raises(UserError, match="prefix_device_bytes = 0"):
        run_benchmark(config.model_copy(update={"cache": cache}))


def test_a_command_is_told_without_places():
    words = ["--config", "a.toml", "--benchmark.folder", "/where", "--benchmark.cases", "1x2+3"]
    assert command("infer.py", words) == "infer.py --config a.toml --benchmark.cases 1x2+3"
    assert command("peer.py", ["--out", "/where/it.json"]) == "peer.py"


def test_a_command_says_how_its_ranks_were_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert command("infer.py", ["--a", "b"]) == "torchrun --standalone --nproc-per-node 2 infer.py --a b"
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert command("infer.py", []) == "torchrun --nnodes 4 --nproc-per-node 2 infer.py"


def test_a_case_is_written_as_prompts_by_tokens_plus_new_ones():
    assert parse_case("64x2048+128") == Case(64, 2048, 128) and str(Case(1, 2, 3)) == "1x2+3"
    for wrong in ("64x2048", "64 x 2048 + 128", "0x5+1", "axb+c"):
        with pytest.raises(UserError, match="as in '64x2048"):
            parse_case(wrong)
    grid = BenchmarkConfig(batches=(1, 2), prompt_tokens=(4,), new_tokens=(1, 8), cases=("2x4+8", "9x9+9"))
    assert [str(case) for case in cases_of(grid)] == ["1x4+1", "1x4+8", "2x4+1", "2x4+8", "9x9+9"]


def test_one_number_of_new_tokens_is_enough_and_counts_begin_at_one():
    assert BenchmarkConfig.model_validate({"new_tokens": 16}).new_tokens == (16,)
    for key in ("batches", "prompt_tokens", "new_tokens"):
        with pytest.raises(ValueError, match="at least 1"):
            BenchmarkConfig.model_validate({key: [4, 0]})


def test_a_trace_shows_the_prefill_and_decode_steps(tmp_path):
    trace = tmp_path / "trace.json"
    run_benchmark(configuration("mamba-tiny", cases=["1x4+3"], profile=str(trace)))
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert any(name.startswith("aten::") for name in names)


def test_a_step_is_what_the_longer_of_two_runs_has_at_its_end():
    prefill, step = [("gemm", 9.0), ("only in prefill", 1.0)], [("gemm", 0.5), ("scan", 0.25), ("gemm", 0.25)]
    short, long = Profile(prefill + 2 * step, 10), Profile(prefill + 6 * step, 18)
    told = long.after(short).told(4)
    assert (told["kernels"], told["launches"], told["busy_ms"], told["reduction_ms"]) == (3, 2, 1000.0, 0.0)
    assert told["longest"] == [
        {"name": "gemm", "count": 2.0, "ms": 750.0},
        {"name": "scan", "count": 1.0, "ms": 250.0},
    ]


def test_a_kernel_has_the_time_that_it_adds():
    # the second starts early under dependent launch, and waits for the first; the third runs beside it
    spans = [(0.0, 2.0, "gemm"), (0.5, 3.0, "scan"), (1.0, 2.5, "copy"), (5.0, 6.0, "gemm")]
    assert list(own_times(spans)) == [("gemm", 2.0), ("scan", 1.0), ("copy", 0.0), ("gemm", 1.0)]


def test_a_sum_beside_the_other_half_has_the_time_that_it_takes_alone():
    spans = [(0.0, 2.0, "gemm"), (1.0, 6.0, "bulk_kernel"), (3.0, 4.0, "scan"), (5.0, 5.5, "gemm"),
             (7.0, 9.0, "bulk_kernel"), (8.0, 12.0, "scan")]  # fmt: skip
    assert list(own_times(spans)) == [
        ("gemm", 2.0), ("bulk_kernel", 1.0 + 1.0 + 0.5), ("scan", 1.0), ("gemm", 0.5),
        ("bulk_kernel", 1.0), ("scan", 4.0),
    ]  # fmt: skip


def test_what_the_profiler_saw_before_the_ranks_set_out_does_not_count():
    def event(device: DeviceType, name: str, start: float, end: float) -> Any:
        time_range = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(device_type=device, name=name, time_range=time_range, is_user_annotation=False)

    gpu, host = DeviceType.CUDA, DeviceType.CPU
    events = [
        event(gpu, "fill", 0, 1), event(gpu, "ncclDevKernel_AllReduce_Sum_f32", 1, 900),
        event(gpu, "gemm", 1000, 1010), event(gpu, "ncclDevKernel_AllReduce_Sum_bf16", 1010, 1014),
        event(host, "cudaLaunchKernelExC", 990, 991), event(host, "cudaGraphLaunch", 991, 992),
        event(host, "cudaStreamSynchronize", 992, 993),
    ]  # fmt: skip
    told = profile_of_gpu(reversed(events), after_barrier=True).told()
    assert (told["kernels"], told["launches"]) == (2, 2)
    assert (told["busy_ms"], told["reduction_ms"]) == (0.014, 0.004)
    alone = profile_of_gpu(events[2:3], after_barrier=False).told()
    assert (alone["kernels"], alone["busy_ms"], alone["reduction_ms"]) == (1, 0.01, 0.0)


def test_reductions_are_known_by_their_kernels_names():
    for name in ("ncclDevKernel_AllReduce_Sum_bf16", "_push_sum_kernel", "bulk_kernel", "gloo:all_reduce"):
        assert is_reduction(name)
    for name in ("_add_rms_norm_kernel", "nvjet_gemm", "ncclDevKernel_Broadcast", "ssm_dist::scan"):
        assert not is_reduction(name)
