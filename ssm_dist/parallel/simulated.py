"""Ranks in the threads of one process: a plan can be tried where no process group exists.

The reductions are opaque ops, so that a dispatch mode can answer them in a thread's stead. The ranks take
turns, each running until it needs the others: torch's lazy imports and tables of modes are not made for
threads that meet in them for the first time, and crashed there, rarely, when the ranks ran at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssm_dist.kernels import add_rms_norm
from ssm_dist.parallel.mesh import TensorParallel

Result = TypeVar("Result")

SECONDS = 120.0
"""How long a simulated rank waits for each of the others, who take turns."""


@dataclass(frozen=True)
class SimulatedRank(TensorParallel):
    """One rank's view; its groups are named "simulated FIRST SIZE"."""

    def subgroup(self, span: int) -> str:
        return f"simulated {self.rank // span * span} {span}"


class _Exchange:
    """Where the ranks of one simulation meet."""

    def __init__(self, degree: int) -> None:
        self.board: list[Any] = [None] * degree
        self.barriers = {(0, degree): threading.Barrier(degree)}
        self.turn = threading.Lock()
        """Held by the rank that runs."""

    def swap(self, rank: int, group: str, what: tuple[str, Tensor]) -> list[Tensor]:
        """Every rank's tensor, in the order of ranks."""
        first, size = map(int, group.split()[1:])
        if any(barrier.broken for barrier in self.barriers.values()):
            raise threading.BrokenBarrierError
        barrier = self.barriers.setdefault((first, size), threading.Barrier(size))
        self.board[rank] = what
        self.turn.release()
        try:
            barrier.wait(SECONDS * size)
            found = self.board[first : first + size]
            barrier.wait(SECONDS * size)
        finally:
            self.turn.acquire()
        kinds = {(name, tensor.shape) for name, tensor in found}
        assert len(kinds) == 1, f"the ranks do not send the same: {kinds}"
        return [tensor for _, tensor in found]

    def abort(self) -> None:
        """Wake all that wait, since somebody will not come, and let nobody wait any more."""
        for barrier in self.barriers.values():
            barrier.abort()


class _Answering(TorchDispatchMode):
    """Answers the collective ops of one rank's thread."""

    def __init__(self, rank: int, exchange: _Exchange) -> None:
        super().__init__()
        self.rank, self.exchange = rank, exchange

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name() if func.namespace == "ssm_dist" else ""
        if not name.startswith("ssm_dist::tp_"):
            return func(*args, **(kwargs or {}))
        group = next(value for value in args if isinstance(value, str))
        parts = self.exchange.swap(self.rank, group, (name, args[0]))
        if name == "ssm_dist::tp_all_gather":
            return torch.cat(parts, dim=1)
        total = torch.stack(parts).sum(0)
        if name == "ssm_dist::tp_all_reduce":
            return total
        assert name == "ssm_dist::tp_all_reduce_add_rms_norm", name
        return add_rms_norm(total, *args[1:4])


def on_simulated_ranks(degree: int, fn: Callable[[TensorParallel], Result]) -> list[Result]:
    """fn on each of `degree` ranks, in inference mode; results by rank. Raises the first error."""
    exchange = _Exchange(degree)
    results: list[Any] = [None] * degree
    errors: list[Exception] = []

    def serve(rank: int) -> None:
        tp = SimulatedRank(cast(Any, None), rank, degree, f"simulated 0 {degree}")
        with exchange.turn:
            try:
                with torch.inference_mode(), _Answering(rank, exchange):
                    results[rank] = fn(tp)
            except Exception as error:
                errors.append(error)
                exchange.abort()

    threads = [threading.Thread(target=serve, args=(rank,), daemon=True) for rank in range(degree)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
