"""Where the time of a case goes, from the profiler: kernels, launches, reductions.

Prefill is profiled whole. A decode step is the difference between two profiled runs of unlike length, so that
neither prefill nor the order in which the engine reads its results matters; models without attention decode
alike after any prompt, so theirs follows a short one.

On a GPU, a kernel counts as a reduction by its name (NCCL's and our own over shared memory; the norm that
some of them include, and the wait for slower ranks, are part of it). While several kernels run at a time, as
under dependent launch, where one starts early and waits, the time is of the one that began first: a kernel's
time is what it adds. Profiled steps are slower than others, kernels in captured graphs above all, so kernel
times are an upper bound, and their shares are what to read.
On a CPU the profiler tells the time in the reduction ops, waiting included, and nothing of kernels.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ssm_dist.benchmark.cases import Case
from ssm_dist.benchmark.timing import run_case
from ssm_dist.llm import LLM

REDUCTION_KERNELS = (
    "ncclDevKernel_AllReduce", "ncclDevKernel_AllGather", "ncclDevKernel_ReduceScatter",
    "ncclDevKernel_SendRecv", "_push_sum", "bulk_kernel", "_encode_kernel", "_sum_kernel", "_decode_kernel",
)  # fmt: skip
"""How the names of kernels begin that reduce between ranks, the exchange's codecs among them."""
REDUCTION_OPS = "ssm_dist::tp_"
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch")
"""How the names of calls begin that start a kernel or a graph."""

SHORT = 16
"""Tokens of the prompts before a decode step of a model without attention."""
FEW, STEPS = 3, 4
"""New tokens of the shorter run, and how many more the longer one has."""
WARMUP = 2
"""Runs before those: a prompt's step is captured when its shape comes for the second time."""
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
    """By the host, a captured graph counting once; None on a CPU, where there are no kernels either."""

    def minus(self, other: Tally, steps: int) -> Tally:
        """The difference, a step."""
        count = {name: (n - other.count.get(name, 0.0)) / steps for name, n in self.count.items()}
        seconds = {name: (s - other.seconds.get(name, 0.0)) / steps for name, s in self.seconds.items()}
        kept = [name for name, n in count.items() if n > 0]
        return Tally(
            defaultdict(float, {name: seconds[name] for name in kept}),
            defaultdict(float, {name: count[name] for name in kept}),
            None if self.launches is None else round((self.launches - (other.launches or 0)) / steps),
        )

    def told(self) -> dict[str, Any]:
        """For the report; times in milliseconds."""
        reductions = sum(s for name, s in self.seconds.items() if is_reduction(name))
        gpu = self.launches is not None
        longest = sorted(self.seconds, key=lambda name: -self.seconds[name])[:LONGEST]
        return {
            "kernels": round(sum(self.count.values())) if gpu else None,
            "launches": self.launches,
            "busy_ms": round(1e3 * sum(self.seconds.values()), 4) if gpu else None,
            "reduction_ms": round(1e3 * reductions, 4),
            "longest": [
                {"name": name[:80], "count": self.count[name], "ms": round(1e3 * self.seconds[name], 4)}
                for name in longest
            ],
        }


def is_reduction(name: str) -> bool:
    """Whether a kernel, or an op, adds up what ranks have."""
    return name.startswith((REDUCTION_OPS, *REDUCTION_KERNELS))


def break_down(llm: LLM, case: Case, barrier: Callable[[], None]) -> dict[str, Any]:
    """Profile a case's prefill and, where it has one, a decode step of its batch. Ranks call it alike."""
    parts = {"prefill_breakdown": _profiled(llm, case, 1, barrier).told()}
    if case.new_tokens > 1:
        short = Case(case.batch, case.prompt_tokens if llm.cache.paged else SHORT, FEW + STEPS)
        for _ in range(WARMUP):
            run_case(llm, short, FEW, barrier)
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
    if not gpu:
        return _tally_of_ops(found.events())
    return tally_of_gpu(found.events(), after_barrier=llm.loaded.tp is not None)


def _profiler(llm: LLM, *, with_host: bool) -> profile:
    gpu = llm.loaded.device.type == "cuda"
    if gpu:
        # tearing the tracer down between captured graphs breaks their next replay on some drivers
        os.environ |= {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}
    activities = [ProfilerActivity.CUDA] if gpu else []
    return profile(activities=activities + ([ProfilerActivity.CPU] if with_host else []), acc_events=True)


def tally_of_gpu(events: Iterable[Any], *, after_barrier: bool) -> Tally:
    """Of the profiler's events; if asked after NCCL's first kernel, which is the barrier before a run."""
    tally, spans, launches = Tally(), [], 0
    for event in events:
        if event.device_type != DeviceType.CUDA:
            launches += event.name.startswith(LAUNCHES)
        elif not event.is_user_annotation:
            spans.append((event.time_range.start, event.time_range.end, event.name))
    spans.sort()
    names = [name for _, _, name in spans]
    barrier = (
        next((i for i, name in enumerate(names) if name.startswith("nccl")), -1) if after_barrier else -1
    )
    for name, microseconds in own_times(spans[barrier + 1 :]):
        tally.seconds[name] += microseconds / 1e6
        tally.count[name] += 1
    tally.launches = launches
    return tally


def own_times(spans: Iterable[tuple[float, float, str]]) -> Iterator[tuple[str, float]]:
    """Of (begin, end, name) in order: what each adds to the time in which any of them runs."""
    reached = float("-inf")
    for begin, end, name in spans:
        yield name, max(0.0, end - max(begin, reached))
        reached = max(reached, end)


def _tally_of_ops(events: Iterable[Any]) -> Tally:
    tally = Tally()
    for event in events:
        if event.name.startswith(REDUCTION_OPS):
            tally.seconds[event.name] += event.cpu_time_total / 1e6
            tally.count[event.name] += 1
    return tally
