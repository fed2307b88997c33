"""Times one case: when each token of each prompt came, run after run, and what follows from that.

A case runs twice a repeat: for one token a prompt, which is prefill alone, and for all G.

    prefill tokens/s     B P / seconds of the first
    output tokens/s      B G / seconds of the second
    ms a decode step     of the second, from the moment when every prompt has its first token to the moment
                         when the first one ends: steps that all B sequences take part in
    time to first token  of each prompt, from the arrival of all; behind a full engine it waits for others
    time a token after   of each prompt, from its first token to its last; others' prompts may come between
    clock, watts         over the runs that prefill is timed by, and over those decode steps (`clocks`)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ssm_dist.benchmark.cases import Case
from ssm_dist.benchmark.clocks import ClockWatch, Span
from ssm_dist.benchmark.floors import (
    Ceilings,
    decode_bytes,
    decode_flop,
    prefill_floor,
    prefill_flop,
    state_bytes,
)
from ssm_dist.errors import UserError
from ssm_dist.llm import LLM
from ssm_dist.sampling.params import SamplingParams
from ssm_dist.state_sizes import PAGE_TOKENS, pages_of

WARMUP_TOKENS = 16
"""New tokens of a run before the measured ones, at most."""


@dataclass(frozen=True)
class Sample:
    """One run; seconds since all prompts arrived."""

    seconds: float
    """To the end of the last one, with all work on the device done."""
    tokens: list[list[float]]
    """When each token came, by prompt."""
    arrival: float = 0.0
    """When the prompts came, by `time.perf_counter`."""

    @property
    def decode_step(self) -> float | None:
        """Seconds a step that all sequences take part in; None when there is none."""
        begin, end = self._decoding
        first_to_end = min(self.tokens, key=lambda times: times[-1])
        steps = sum(moment > begin for moment in first_to_end)
        return (end - begin) / steps if steps else None

    @property
    def whole(self) -> Span:
        """The run."""
        return self.arrival, self.arrival + self.seconds

    @property
    def decoding(self) -> Span:
        """The steps that all sequences take part in; of no length when there is none."""
        begin, end = self._decoding
        return self.arrival + begin, self.arrival + max(begin, end)

    @property
    def _decoding(self) -> tuple[float, float]:
        return max(times[0] for times in self.tokens), min(times[-1] for times in self.tokens)


def run_case(llm: LLM, case: Case, new_tokens: int, barrier: Callable[[], None]) -> Sample:
    """Run the case once, for `new_tokens` instead of its own. Raises `UserError` as `LLM.generate`."""
    prompts = case.prompts(llm.loaded.config.vocab_size)
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    tokens: list[list[float]] = [[] for _ in prompts]
    barrier()
    begin = _now(llm.loaded.device)
    for event in llm.stream(prompts, params):
        tokens[event.index].append(time.perf_counter() - begin)
    return Sample(_now(llm.loaded.device) - begin, tokens, begin)


def time_case(
    llm: LLM, case: Case, repeats: int, warmup: int, rates: Ceilings | None, barrier: Callable[[], None],
    watch: ClockWatch | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure a case, or say in "error" why this engine cannot hold it. Ranks call it alike.

    watch: of this rank's GPU, running.
    """
    gpu = llm.loaded.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(llm.loaded.device)
    try:
        require_room(llm, case)
        for _ in range(warmup):
            run_case(llm, case, min(case.new_tokens, WARMUP_TOKENS), barrier)
        lengths = (1, case.new_tokens) if case.new_tokens > 1 else (1,)
        samples = [run_case(llm, case, n, barrier) for _ in range(repeats) for n in lengths]
    except (UserError, torch.OutOfMemoryError) as error:
        if gpu:
            torch.cuda.empty_cache()
        return {"error": str(error)}
    measures = _prefill(llm, case, samples[:: len(lengths)], rates)
    if case.new_tokens > 1:
        measures |= _decode(llm, case, samples[1::2], rates)
    if watch is not None:
        measures["prefill_clock"] = watch.over(sample.whole for sample in samples[:: len(lengths)])
        if case.new_tokens > 1:
            measures["decode_clock"] = watch.over(sample.decoding for sample in samples[1::2])
    peak = torch.cuda.max_memory_allocated(llm.loaded.device) if gpu else None
    return measures | {"peak_memory_bytes": peak}


def require_room(llm: LLM, case: Case) -> None:
    """Raise `UserError` when the case's sequences cannot be in flight together."""
    slots, tokens = llm.cache.max_sequences, case.prompt_tokens + case.new_tokens - 1
    if case.batch > slots:
        raise UserError(f"{case.batch} sequences, but [cache] max_sequences is {slots}")
    need = case.batch * pages_of(tokens) * PAGE_TOKENS
    if llm.cache.paged and need > llm.cache.max_tokens:
        raise UserError(f"{need} tokens of keys and values, but [cache] max_tokens is {llm.cache.max_tokens}")


def _prefill(llm: LLM, case: Case, samples: list[Sample], rates: Ceilings | None) -> dict[str, Any]:
    seconds = [sample.seconds for sample in samples]
    median, degree = statistics.median(seconds), llm.config.parallel.tensor
    flop, tokens = prefill_flop(llm, case), case.batch * case.prompt_tokens
    chunks = -(-tokens // llm.loaded.chunk_tokens)
    moved = chunks * decode_bytes(llm, 0, 0) + 2 * case.batch * state_bytes(llm)
    return {
        "prefill_seconds": spread(seconds),
        "prefill_floor_seconds": rates and prefill_floor(llm, case, rates),
        "prefill_tokens_per_second": round(tokens / median, 1),
        "prefill_tflop_per_second_a_rank": round(flop / median / degree / 1e12, 4),
        "prefill_flop_a_byte": round(flop / degree / moved, 3),
        "first_token_ms": quantiles([times[0] for sample in samples for times in sample.tokens]),
    }


def _decode(llm: LLM, case: Case, samples: list[Sample], rates: Ceilings | None) -> dict[str, Any]:
    new = case.new_tokens
    seconds = [sample.seconds for sample in samples]
    each = [times for sample in samples for times in sample.tokens]
    measures: dict[str, Any] = {
        "request_seconds": spread(seconds),
        "output_tokens_per_second": round(case.batch * new / statistics.median(seconds), 1),
        "first_token_ms": quantiles([times[0] for times in each]),
        "token_ms": quantiles([(times[-1] - times[0]) / (new - 1) for times in each]),
    }
    steps = [step for sample in samples if (step := sample.decode_step) is not None]
    if not steps:
        return measures | {"decode_ms_a_step": None}
    step, context = statistics.median(steps), case.prompt_tokens + new / 2
    moved, degree = decode_bytes(llm, case.batch, context), llm.config.parallel.tensor
    return measures | {
        "decode_step_seconds": spread(steps),
        "decode_ms_a_step": round(1e3 * step, 4),
        "decode_floor_ms": rates and round(1e3 * moved / rates.bytes, 4),
        "decode_tokens_per_second": round(case.batch / step, 1),
        "decode_gb_per_second": round(moved / step / 1e9, 3),
        "decode_tflop_per_second_a_rank": round(
            decode_flop(llm, case.batch, context) / step / degree / 1e12, 4
        ),
        "decode_flop_a_byte": round(decode_flop(llm, case.batch, context) / degree / moved, 3),
    }


def spread(seconds: list[float]) -> dict[str, Any]:
    """Minimum, median and maximum, and what they are of."""
    return {
        "min": min(seconds),
        "median": statistics.median(seconds),
        "max": max(seconds),
        "all": seconds,
    }


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile in milliseconds; the percentile is the smallest that 99 % do not exceed."""
    ordered = sorted(seconds)
    p99 = ordered[max(0, -(-99 * len(ordered) // 100) - 1)]
    return {"median": round(1e3 * statistics.median(ordered), 4), "p99": round(1e3 * p99, 4)}


def _now(device: torch.device) -> float:
    """The clock, after all work queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
