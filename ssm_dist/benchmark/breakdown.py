"""Where the time of a case goes, from the profiler: kernels, launches, reductions.

Prefill is profiled whole. A decode step is the difference between two profiled runs of unlike length, so that
neither prefill nor the order in which the engine reads its results matters; models without attention decode
alike after any prompt, so theirs follows a short one.

On a GPU, a kernel counts as a reduction by its name (NCCL's and our own over shared memory; the norm that
some of them include, and the wait for slower ranks, are part of it). Profiled steps are slower than others,
kernels in captured graphs above all, so kernel times are an upper bound, and their shares are what to read.
On a CPU the profiler tells the time in the reduction ops, waiting included, and nothing of kernels.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ssm_dist.benchmark.cases import Case
from ssm_dist.benchmark.timing import run_case
from ssm_dist.llm import LLM

REDUCTION_KERNELS = ("nccl", "push_sum", "bulk_kernel", "_encode_kernel", "_sum_kernel", "_decode_kernel")
"""Parts of the names of kernels that reduce between ranks, the exchange's codecs among them."""
REDUCTION_OPS = "ssm_dist::tp_"
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch")
"""How the names of calls begin that start a kernel or a graph."""

SHORT = 16
"""Tokens of the prompts before a decode step of a model without attention."""
FEW, STEPS = 3, 4
"""New tokens of the shorter run, and how many more the longer one has."""
LONGEST = 8
"""Kernels that are named."""
TRACED_TOKENS = 8


@dataclass
class Tally:
    """What one profiled run did."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By kernel or copy; on a CPU by reduction op."""
    count: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    launches: int | None = None
    """By the host, a captured graph counting once; None on a CPU, as for the next."""
    busy: float | None = None
    """Seconds in which at least one kernel or copy ran."""

    def minus(self, other: Tally, steps: int) -> Tally:
        """The difference, a step."""
        count = {name: (n - other.count.get(name, 0.0)) / steps for name, n in self.count.items()}
        seconds = {name: (s - other.seconds.get(name, 0.0)) / steps for name, s in self.seconds.items()}
        kept = [name for name, n in count.items() if n > 0]
        return Tally(
            defaultdict(float, {name: seconds[name] for name in kept}),
            defaultdict(float, {name: count[name] for name in kept}),
            None if self.launches is None else round((self.launches - (other.launches or 0)) / steps),
            None if self.busy is None else (self.busy - (other.busy or 0.0)) / steps,
        )

    def told(self) -> dict[str, Any]:
        """For the report; times in milliseconds."""
        reductions = sum(s for name, s in self.seconds.items() if is_reduction(name))
        longest = sorted(self.seconds, key=lambda name: -self.seconds[name])[:LONGEST]
        return {
            "kernels": None if self.busy is None else round(sum(self.count.values())),
            "launches": self.launches,
            "busy_ms": None if self.busy is None else round(1e3 * self.busy, 4),
            "reduction_ms": round(1e3 * reductions, 4),
            "longest": [
                {"name": name[:80], "count": self.count[name], "ms": round(1e3 * self.seconds[name], 4)}
                for name in longest
            ],
        }


def is_reduction(name: str) -> bool:
    """Whether a kernel, or an op, adds up what ranks have."""
    return name.startswith(REDUCTION_OPS) or any(part in name.lower() for part in REDUCTION_KERNELS)


def break_down(llm: LLM, case: Case, barrier: Callable[[], None]) -> dict[str, Any]:
    """Profile a case's prefill and, where it has one, a decode step of its batch. Ranks call it alike."""
    parts = {"prefill_breakdown": _profiled(llm, case, 1, barrier).told()}
    if case.new_tokens > 1:
        short = Case(case.batch, case.prompt_tokens if llm.cache.paged else SHORT, FEW + STEPS)
        run_case(llm, short, FEW, barrier)  # captures its prefill, where that is new
        few, more = (_profiled(llm, short, n, barrier) for n in (FEW, FEW + STEPS))
        parts["decode_breakdown"] = more.minus(few, STEPS).told()
    return parts


def write_trace(llm: LLM, case: Case, path: Path, barrier: Callable[[], None]) -> None:
    """A trace of the case's prefill and its first decode steps, written by rank 0. Ranks call it alike."""
    new_tokens = min(case.new_tokens, TRACED_TOKENS)
    with _profiler(llm, with_host=True) as found:
        run_case(llm, case, new_tokens, barrier)
    if llm.loaded.tp is None or llm.loaded.tp.rank == 0:
        found.export_chrome_trace(str(path))


def _profiled(llm: LLM, case: Case, new_tokens: int, barrier: Callable[[], None]) -> Tally:
    gpu = llm.loaded.device.type == "cuda"
    with _profiler(llm, with_host=not gpu) as found:
        run_case(llm, case, new_tokens, barrier)
    return _tally_of_gpu(found.events()) if gpu else _tally_of_ops(found.events())


def _profiler(llm: LLM, *, with_host: bool) -> profile:
    gpu = llm.loaded.device.type == "cuda"
    if gpu:
        # tearing the tracer down between captured graphs breaks their next replay on some drivers
        os.environ |= {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}
    activities = [ProfilerActivity.CUDA] if gpu else []
    return profile(activities=activities + ([ProfilerActivity.CPU] if with_host else []))


def _tally_of_gpu(events: Iterable[Any]) -> Tally:
    tally, spans, launches = Tally(), [], 0
    for event in events:
        if event.device_type != DeviceType.CUDA:
            launches += event.name.startswith(LAUNCHES)
        elif not event.is_user_annotation:
            begin, end = event.time_range.start, event.time_range.end
            spans.append((begin, end))
            tally.seconds[event.name] += (end - begin) / 1e6
            tally.count[event.name] += 1
    tally.launches, tally.busy = launches, covered(spans) / 1e6
    return tally


def _tally_of_ops(events: Iterable[Any]) -> Tally:
    tally = Tally()
    for event in events:
        if event.name.startswith(REDUCTION_OPS):
            tally.seconds[event.name] += event.cpu_time_total / 1e6
            tally.count[event.name] += 1
    return tally


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans, each (begin, end)."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
