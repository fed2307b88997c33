"""Measures which algorithm is the fastest for reductions of each size on this host, and tabulates it."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from ssm_dist.parallel import TensorParallel
from ssm_dist.parallel.collectives import tp_all_reduce, wait_for_device
from ssm_dist.parallel.collectives.groups import Group, group_named
from ssm_dist.parallel.collectives.tables import ANY, CODECS, SHIPPED, TRANSPORTS, Rows, Table

CALLS = 20
"""In one graph, so that the host's part of a time is small."""

CLEARLY = 0.97
"""A switch to another algorithm must take less than this share of the time: ties would follow the noise."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one reduction, of the slowest rank."""

    transport: str
    codec: str
    algorithm: str
    message_bytes: int
    seconds: float


def calibrate(
    tp: TensorParallel, width: int, dtype: torch.dtype, device: torch.device, tokens: int, repeats: int
) -> list[Timing]:
    """Time every algorithm that fits for 1, 2, 4, ... tokens up to `tokens`; ranks call it alike."""
    group = group_named(tp.group)
    transports = [group.backend] if group.memory is None else ["shared", group.backend]
    counts = [2**i for i in range(math.ceil(math.log2(tokens)) + 1)]
    timings = []
    for count, codec in itertools.product(counts, CODECS):
        x = torch.randn(min(count, tokens), width, device=device).to(dtype)
        size = 32 if codec == "int4" else 128
        taken: dict[str, float] = {}
        for transport in transports:
            for algorithm in TRANSPORTS[transport]:
                if not _serves(group, algorithm, x, codec, size):
                    continue
                if algorithm not in taken:
                    call = partial(tp_all_reduce, x, tp.group, codec, size, algorithm)
                    taken[algorithm] = _seconds(tp, call, device, repeats)
                timings.append(Timing(transport, codec, algorithm, x.nbytes, taken[algorithm]))
    return timings


def table_of(timings: Sequence[Timing], ranks: int) -> Table:
    """The table that ships, with what was measured in the place of its entries for that many ranks."""
    table = {transport: dict(by_ranks) for transport, by_ranks in SHIPPED.items()}
    for transport in dict.fromkeys(timing.transport for timing in timings):
        mine = [timing for timing in timings if timing.transport == transport]
        table[transport][ranks] = {codec: _rows([t for t in mine if t.codec == codec]) for codec in CODECS}
    return table


def _rows(timings: list[Timing]) -> Rows:
    """The fastest by size, kept where another is not clearly faster; limits midway between sizes."""
    by_size: dict[int, dict[str, float]] = {}
    for timing in timings:
        by_size.setdefault(timing.message_bytes, {})[timing.algorithm] = timing.seconds
    rows: Rows = []
    current, before = "", 0
    for size, seconds in sorted(by_size.items()):
        best = min(seconds, key=seconds.__getitem__)
        if current not in seconds or seconds[best] < CLEARLY * seconds[current]:
            if current:
                rows.append((round(math.sqrt(before * size)), current))
            current = best
        before = size
    return [*rows, (ANY, current)]


def _serves(group: Group, algorithm: str, x: torch.Tensor, codec: str, group_size: int) -> bool:
    if algorithm in TRANSPORTS["nccl"]:
        return True
    assert group.memory is not None
    return group.memory.fits(algorithm, x, codec, group_size, with_norm=True)


def _seconds(
    tp: TensorParallel, call: Callable[[], torch.Tensor], device: torch.device, repeats: int
) -> float:
    """Of one call: the median of the repeats, of the slowest rank; in a CUDA graph on a GPU."""
    for _ in range(2):
        call()
    run: Callable[[], object] = call
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(CALLS):
                call()
        run = graph.replay
    times = []
    for _ in range(repeats):
        dist.barrier()
        begin = time.perf_counter()
        run()
        wait_for_device(tp.group, device)
        times.append(time.perf_counter() - begin)
    median = torch.tensor(statistics.median(times), device=device)
    dist.all_reduce(median, op=dist.ReduceOp.MAX)
    return float(median) / (CALLS if device.type == "cuda" else 1)
