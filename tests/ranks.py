"""Run a function on every rank of a process group, in worker processes that outlive the test.

    def sum_over_ranks(start: int) -> float:                    # at module level of a test file
        total = torch.tensor(float(start + dist.get_rank()))
        dist.all_reduce(total)
        return total.item()

    assert run_on_ranks(2, sum_over_ranks, 10) == [21.0, 21.0]

Workers are forked from one server that has imported torch, so that a pool costs a fraction of a second, and
serve until the session ends. Keep fn in a module without slow imports of its own: transformers takes seconds.
A pool that has seen a failure is ended, since its ranks may no longer agree on the next collective; the next
call starts another.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

Device = Literal["cpu", "cuda"]
Result = TypeVar("Result")

PRELOADED = ["torch", "torch.distributed.tensor", "torch._dynamo", "ssm_dist.checkpoint", "ssm_dist.registry"]
"""What nearly every test needs, and takes seconds to import."""

TIMEOUT = 120.0
"""Seconds that a call may take before its ranks count as hung."""

GRACE = 1.0
"""Seconds that the other ranks have to report after the first one failed."""


class RankError(AssertionError):
    """What went wrong on which ranks: tracebacks, exit codes, or where a hung rank stands."""


def run_on_ranks(
    n: int, fn: Callable[..., Result], *args: Any, device: Device = "cpu", timeout: float = TIMEOUT
) -> list[Result]:
    """fn(*args) on each of n ranks, with torch.distributed initialised for exactly them; results by rank.

    fn must be importable by name; arguments and results are pickled (tensors by value, on the CPU). Each rank
    has one torch thread, the random seed 0, the variables that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK),
    and with device="cuda" a GPU of its own and NCCL in the place of gloo. Raises `RankError` when a rank
    raises, dies, or takes longer than `timeout` seconds.
    """
    pool = _pools.get((n, device))
    if pool is None:
        pool = _pools[n, device] = _Pool.start(n, device)
    try:
        return pool.run(fn, args, timeout)
    except BaseException:
        _pools.pop((n, device)).end()
        raise


def start_on_ranks(
    n: int, fn: Callable[..., Result], *args: Any, device: Device = "cpu", timeout: float = TIMEOUT
) -> Future[list[Result]]:
    """`run_on_ranks`, while the test goes on: on GPU hosts ranks take long to start, and to compile kernels.

    One call after the other; until all have ended, nothing else may run on ranks.
    """
    return _beside.submit(run_on_ranks, n, fn, *args, device=device, timeout=timeout)


_beside = ThreadPoolExecutor(1)


def end_all_ranks() -> None:
    """End the workers; for the end of the session."""
    for key in list(_pools):
        _pools.pop(key).end()


_Outcome = tuple[bool, Any]
"""(True, result) or (False, traceback)."""


@dataclass
class _Pool:
    """The parent's side of n workers."""

    processes: Sequence[BaseProcess]
    connections: list[Connection]
    folder: tempfile.TemporaryDirectory[str]
    """Rendezvous files, and where the ranks write their stacks when they are asked to."""
    calls: int = 0

    @classmethod
    def start(cls, n: int, device: Device) -> _Pool:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        folder = tempfile.TemporaryDirectory(prefix="ranks")
        processes, connections = [], []
        for rank in range(n):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(rank, n, device, theirs, folder.name), daemon=True)
            worker.start()
            theirs.close()
            processes.append(worker)
            connections.append(ours)
        return cls(processes, connections, folder)

    def run(self, fn: Callable[..., Result], args: tuple[Any, ...], timeout: float) -> list[Result]:
        self.calls += 1
        job = pickle.dumps((sys.path, str(self.calls), pickle.dumps((fn, args))))
        for connection in self.connections:
            connection.send_bytes(job)
        outcomes = self._collect(time.monotonic() + timeout)
        failures = {rank: text for rank, (good, text) in enumerate(outcomes) if not good}
        if failures:
            reports = "\n".join(
                f"--- rank {rank} of {len(outcomes)}:\n{text}" for rank, text in failures.items()
            )
            raise RankError(f"{fn.__qualname__} failed\n{reports}")
        return [result for _, result in outcomes]

    def _collect(self, deadline: float) -> list[_Outcome]:
        """The outcome of every rank, at the latest at the deadline or a little after the first failure."""
        outcomes: dict[int, _Outcome] = {}
        pending = dict(enumerate(self.connections))
        while pending and (ready := wait(pending.values(), max(0.0, deadline - time.monotonic()))):
            for rank in [rank for rank, connection in pending.items() if connection in ready]:
                outcomes[rank] = self._receive(rank)
                del pending[rank]
                if not outcomes[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return [outcomes.get(rank) or (False, self._stack(rank)) for rank in range(len(self.processes))]

    def _receive(self, rank: int) -> _Outcome:
        try:
            outcome: _Outcome = pickle.loads(self.connections[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            self.processes[rank].join(GRACE)
            return False, f"ended with exit code {self.processes[rank].exitcode}"
        return outcome

    def _stack(self, rank: int) -> str:
        """Where a rank that does not answer stands."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.2)
        return "did not finish; it stands at\n" + _stack_file(self.folder.name, rank).read_text()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process, connection in zip(self.processes, self.connections, strict=True):
            process.join()
            connection.close()
        self.folder.cleanup()


_pools: dict[tuple[int, Device], _Pool] = {}


def _serve(rank: int, world: int, device: Device, connection: Connection, folder: str) -> None:
    """The life of a worker: jobs in, outcomes out, until the parent is gone."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    with _stack_file(folder, rank).open("w") as stack:
        faulthandler.register(signal.SIGUSR1, stack)
        while True:
            try:
                path, call, job = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            sys.path[:] = path
            connection.send_bytes(_answer(job, rank, world, device, Path(folder, call)))


def _answer(job: bytes, rank: int, world: int, device: Device, rendezvous: Path) -> bytes:
    try:
        if not dist.is_initialized():  # this is the first job, or the last one left the group
            _join(rank, world, device, rendezvous)
        torch.manual_seed(0)
        fn, args = pickle.loads(job)
        return pickle.dumps((True, fn(*args)))
    except Exception:
        return pickle.dumps((False, traceback.format_exc()))


def _join(rank: int, world: int, device: Device, rendezvous: Path) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name need not resolve
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=rendezvous.as_uri(),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT),
        device_id=torch.device("cuda", rank) if device == "cuda" else None,
    )


def _stack_file(folder: str, rank: int) -> Path:
    return Path(folder, f"stack of rank {rank}")
