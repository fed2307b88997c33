"""Compiles what `reductions.py` is about to call, in processes beside each rank."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable
from multiprocessing.process import BaseProcess

import torch
from reductions_ways import WAYS, normalised

from ssm_dist.kernels import add_rms_norm, backend
from ssm_dist.parallel.collectives import tp_all_reduce_add_rms_norm, tp_all_reduce_add_rms_norm_split

MOST_PROCESSES = 8
"""A rank."""
SECONDS = 60.0
"""Most time that they may take; what is not compiled then, the ranks compile themselves."""

Job = tuple[int, int, bool, str]
"""Rows, width, whether a norm follows, and the name of the way."""


class Children:
    """The processes of one rank."""

    def __init__(self, processes: list[BaseProcess]) -> None:
        self._processes = processes
        self._deadline = time.monotonic() + SECONDS

    def join(self) -> None:
        """Wait until they are done, or end them."""
        for process in self._processes:
            process.join(max(0.0, self._deadline - time.monotonic()))
            if process.is_alive():
                process.kill()


def jobs(shared: bool, names: Iterable[str]) -> list[Job]:
    """One for every piece of code; the number of rows is none of its matters, but for what a slot holds."""
    found = []
    for name, (_, _, algorithm) in [(name, WAYS[name]) for name in names]:
        if algorithm == "exchange" or (shared and algorithm in ("one_shot", "two_shot", "bulk")):
            found += [
                (rows, width, False, name) for rows, width in ((256, 2560), (64, 264), (64, 288), (1, 192))
            ]
            found += [(rows, width, True, name) for rows, width in ((256, 2560), (256, 4096))]
    return found


def compile_ahead(
    device: torch.device, memory: tuple[int, int], shared: bool, names: Iterable[str]
) -> Children:
    """Start compiling the ways `names`; before CUDA is initialised here.

    memory: as `group_without_others` takes it.
    """
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    count = max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0)) // local - 1))
    context = multiprocessing.get_context("fork")  # torch is there already
    shares = [jobs(shared, names)[rank * count + i :: world * count] for i in range(count)]
    processes = [
        context.Process(target=_compile, args=(share, world, device, memory), daemon=True) for share in shares
    ]
    for process in processes:
        process.start()
    return Children(processes)


def _compile(share: list[Job], ranks: int, device: torch.device, memory: tuple[int, int]) -> None:
    from ssm_dist.parallel.collectives.compiling import compile_only, compile_sum, group_without_others

    torch.cuda.set_device(device)
    backend.select("triton", device)
    group = group_without_others(ranks, *memory, device)
    with compile_only():
        for rows, width, norm, name in share:
            codec, size, algorithm = WAYS[name]
            x = torch.empty(rows, width, dtype=torch.bfloat16, device=device)
            args = (x, x.float(), x[0].clone(), 1e-5)
            if not norm or algorithm == "exchange":
                compile_sum(x, group, ranks, codec, size, algorithm)
            elif algorithm == "bulk":
                tp_all_reduce_add_rms_norm_split(*args, group, ranks, codec, size, algorithm)
            else:
                tp_all_reduce_add_rms_norm(*args, group, codec, size, algorithm)
            add_rms_norm(*args)
            if width == 288:
                normalised(x)
