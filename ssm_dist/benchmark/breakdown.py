"""Where the time of a case goes, from the profiler: kernels, launches, reductions.

Prefill is profiled whole. Decode is profiled in two runs of unlike length: the longer one's last steps are as
many kernels as it has more. Models without attention decode alike after any prompt, so theirs is a short one;
others have the case's own, or as much of it as lets one step read all prompts, so that all decode together.

On a GPU, a kernel counts as a reduction by its name (NCCL's and our own over shared memory; the norm that
some of them include, and the wait for slower ranks, are part of it). While several kernels run at a time, as
under dependent launch, where one starts early and waits, the time is of the one that began first: a kernel's
time is what it adds. A long sum beside the compute of the other half of a step comes last: its time is what
it takes alone. Profiled steps are slower than others, kernels in captured graphs above all, so kernel
times are an upper bound, and their shares are what to read.
On a CPU the profiler tells the time in gloo's collectives, waiting included, and nothing of kernels.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ssm_dist.benchmark.cases import Case
from ssm_dist.benchmark.timing import require_room, run_case
from ssm_dist.errors import UserError
from ssm_dist.llm import LLM

REDUCTION_KERNELS = (
    "ncclDevKernel_AllReduce", "ncclDevKernel_AllGather", "ncclDevKernel_ReduceScatter",
    "ncclDevKernel_SendRecv", "_push_sum", "bulk_kernel", "_encode_kernel", "_sum_kernel", "_decode_kernel",
)  # fmt: skip
"""How the names of kernels begin that reduce between ranks, the exchange's codecs among them."""
BESIDE_OTHERS = ("bulk_kernel",)
"""And of those that the other half of a step may run beside."""
REDUCTION_OPS = ("gloo:all_reduce", "gloo:all_gather", "gloo:all_to_all")
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch")
"""How the names of calls begin that start a kernel or a graph."""

SHORT = 16
"""Tokens of the prompts before the decode steps of a model without attention."""
FEW, STEPS = 3, 8
"""New tokens of the shorter run, and how many more the longer one has."""
WARMUP = 2
"""Runs before those: a prompt's step is captured when its shape comes for the second time."""
LONGEST = 8
"""Kernels that are named."""
TRACED_TOKENS = 8


@dataclass(frozen=True)
class Profile:
    """What one run did."""

    calls: list[tuple[str, float]]
    """Name and seconds of every kernel and copy, in order; on a CPU of every collective that reduces."""
    launches: int | None
    """By the host, a captured graph counting once; None on a CPU, where there are no kernels either."""

    def told(self, steps: int = 1) -> dict[str, Any]:
        """For the report, a step; times in milliseconds."""
        count, times = Counter(name for name, _ in self.calls), dict.fromkeys((n for n, _ in self.calls), 0.0)
        for name, seconds in self.calls:
            times[name] += 1e3 * seconds / steps
        gpu = self.launches is not None
        return {
            "kernels": round(len(self.calls) / steps) if gpu else None,
            "launches": round(self.launches / steps) if self.launches is not None else None,
            "busy_ms": round(sum(times.values()), 4) if gpu else None,
            "reduction_ms": round(sum(ms for name, ms in times.items() if is_reduction(name)), 4),
            "longest": [
                {"name": name[:80], "count": count[name] / steps, "ms": round(times[name], 4)}
                for name in sorted(times, key=lambda name: -times[name])[:LONGEST]
            ],
        }

    def after(self, shorter: Profile) -> Profile:
        """What this run does more than a shorter one, at its end."""
        launches = None
        if self.launches is not None and shorter.launches is not None:
            launches = self.launches - shorter.launches
        return Profile(self.calls[len(shorter.calls) :], launches)


def is_reduction(name: str) -> bool:
    """Whether a kernel, or an op, adds up what ranks have."""
    return name.startswith((*REDUCTION_OPS, *REDUCTION_KERNELS))


def break_down(llm: LLM, case: Case, barrier: Callable[[], None]) -> dict[str, Any]:
    """Profile a case's prefill and, where it has one, decode steps of its batch. Ranks call it alike."""
    parts = {"prefill_breakdown": _profiled(llm, case, 1, barrier).told()}
    at_once = max(SHORT, llm.loaded.chunk_tokens // case.batch)
    prompt = min(case.prompt_tokens, at_once) if llm.cache.paged else SHORT
    short = Case(case.batch, prompt, FEW + STEPS)
    if case.new_tokens == 1 or not _has_room(llm, short):
        return parts
    for _ in range(WARMUP):
        run_case(llm, short, FEW, barrier)
    few, more = (_profiled(llm, short, n, barrier) for n in (FEW, FEW + STEPS))
    return parts | {"decode_breakdown": more.after(few).told(STEPS) | {"prompt_tokens": prompt}}


def write_trace(llm: LLM, case: Case, path: Path, barrier: Callable[[], None]) -> None:
    """A trace of the case's prefill and its first decode steps, written by rank 0. Ranks call it alike."""
    new_tokens = min(case.new_tokens, TRACED_TOKENS)
    with _profiler(llm, with_host=True) as found:
        run_case(llm, case, new_tokens, barrier)
    if llm.loaded.tp is None or llm.loaded.tp.rank == 0:
        found.export_chrome_trace(str(path))


def _has_room(llm: LLM, case: Case) -> bool:
    try:
        require_room(llm, case)
    except UserError:
        return False
    return True


def _profiled(llm: LLM, case: Case, new_tokens: int, barrier: Callable[[], None]) -> Profile:
    gpu = llm.loaded.device.type == "cuda"
    with _profiler(llm, with_host=not gpu) as found:
        run_case(llm, case, new_tokens, barrier)
    if not gpu:
        spans = [(op.time_range.start, op.time_range.end, op.name) for op in found.events()]
        ops = sorted(span for span in spans if span[2].startswith(REDUCTION_OPS))
        return Profile([(name, (end - begin) / 1e6) for begin, end, name in ops], None)
    return profile_of_gpu(found.events(), after_barrier=llm.loaded.tp is not None)


def _profiler(llm: LLM, *, with_host: bool) -> profile:
    gpu = llm.loaded.device.type == "cuda"
    if gpu:
        # tearing the tracer down between captured graphs breaks their next replay on some drivers
        os.environ |= {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}
    activities = [ProfilerActivity.CUDA] if gpu else []
    return profile(activities=activities + ([ProfilerActivity.CPU] if with_host else []), acc_events=True)


def profile_of_gpu(events: Iterable[Any], *, after_barrier: bool) -> Profile:
    """Of the profiler's events; if asked after NCCL's first kernel, which is the barrier before a run."""
    spans, launches = [], 0
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
    return Profile([(name, time / 1e6) for name, time in own_times(spans[barrier + 1 :])], launches)


def own_times(spans: Sequence[tuple[float, float, str]]) -> Iterator[tuple[str, float]]:
    """Of (begin, end, name) in order: what each adds to the time in which any of them runs.

    What may run beside others is last in adding: its time is when nothing else runs.
    """
    others = [(begin, end) for begin, end, name in spans if not name.startswith(BESIDE_OTHERS)]
    beside, reached = float("-inf"), float("-inf")
    ahead = 0
    for begin, end, name in spans:
        if not name.startswith(BESIDE_OTHERS):
            yield name, max(0.0, end - max(begin, reached))
            reached = max(reached, end)
            continue
        start, own = max(begin, reached, beside), 0.0
        while ahead < len(others) and others[ahead][0] < begin:
            ahead += 1
        for other_begin, other_end in others[ahead:]:
            if other_begin >= end:
                break
            own += max(0.0, other_begin - start)
            start = max(start, other_end)
        yield name, own + max(0.0, end - start)
        beside = max(beside, end)
