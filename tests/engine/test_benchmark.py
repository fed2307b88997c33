"""The benchmark: its arithmetic, and what it says of cases that cannot run."""

from __future__ import annotations

import pytest

from ssm_dist import LLM, Config, UserError
from ssm_dist.benchmark import flop_a_token, markdown, run_benchmark
from ssm_dist.config import BenchmarkConfig


def load(preset: str, max_tokens: int = 4096) -> LLM:
    cache = {"max_sequences": 2, "max_tokens": max_tokens}
    return LLM.from_config(Config.model_validate({"model": {"preset": preset}, "cache": cache}))


def test_a_case_reports_rates_that_follow_from_its_times():
    report = run_benchmark(
        load("mamba-tiny"), BenchmarkConfig(batches=(1, 2), prompt_tokens=(5, 40), new_tokens=4, repeats=2)
    )
    assert [(c["batch"], c["prompt_tokens"]) for c in report["cases"]] == [(1, 5), (1, 40), (2, 5), (2, 40)]
    for case in report["cases"]:
        prefill, whole = case["prefill_seconds"], case["request_seconds"]
        assert 0 < prefill["min"] <= prefill["median"] <= prefill["max"]
        tokens = case["batch"] * case["prompt_tokens"]
        assert case["prefill_tokens_per_second"] == pytest.approx(tokens / prefill["median"], rel=0.01)
        assert case["output_tokens_per_second"] == pytest.approx(
            4 * case["batch"] / whole["median"], rel=0.01
        )
    page = markdown(report)
    assert page.count("\n|") == 2 + len(report["cases"]) and "reductions" in page


def test_the_operations_of_a_token_are_those_of_the_released_models():
    # 2 x parameters without the embedding; zamba's shared block counts once a call: 22.8 GFLOP
    layer = 2 * (2 * 128 * 64 + 128 * 4 + 128 * 36 + 128 * 4 + 64 * 128 + 128 * 16)
    assert flop_a_token(load("mamba-tiny")) == 2 * layer


def test_a_case_that_does_not_fit_gives_its_reason_and_the_rest_runs():
    grid = BenchmarkConfig(batches=(1,), prompt_tokens=(500, 8), new_tokens=2, repeats=1, warmup=0)
    long, short = run_benchmark(load("zamba-tiny", max_tokens=64), grid)["cases"]
    assert "max_tokens" in long["error"] and short["decode_ms_a_step"] is not None


def test_a_batch_larger_than_the_cache_is_refused():
    with pytest.raises(UserError, match="max_sequences is 2"):
        run_benchmark(load("mamba-tiny"), BenchmarkConfig(batches=(3,)))
