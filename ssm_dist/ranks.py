"""The ranks of a job: joining them, and making one of them speak when something fails.

torchrun ends all ranks as soon as one exits, so a rank with nothing to say must not exit before the one
that has. Whoever fails first claims the right to speak in the store that all ranks share; it prints and
exits. The others wait to be ended, for a bounded time.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from ssm_dist.errors import UserError

JOIN_TIMEOUT = timedelta(minutes=10)
"""For ranks to find each other, and for any collective: loading may take one rank minutes longer."""

SPEAK_TIMEOUT = timedelta(seconds=30)
"""For a failing rank to reach the store, and then to be ended by the rank that speaks."""

_ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}

_store: dist.Store | None = None


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of its job."""

    rank: int
    world: int
    local_rank: int
    device: torch.device


def init_ranks(expected: int, device_type: str) -> Ranks:
    """Join the job's process group; none for a single process.

    `expected` is `[parallel] tensor`; `device_type` is "cuda", for NCCL and a GPU for each rank, or "cpu",
    for gloo. Raises `UserError` when torchrun started another number of ranks, or this host has too few GPUs.
    """
    rank, world, local_rank = (int(os.environ.get(key, fallback)) for key, fallback in _ENVIRONMENT.items())
    if world != expected:
        raise UserError(_world_size_mismatch(expected, world))
    device = _device(device_type, local_rank)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device_type == "cuda" else "gloo",
            store=dist.PrefixStore("ranks", _job_store(JOIN_TIMEOUT)),
            rank=rank,
            world_size=world,
            timeout=JOIN_TIMEOUT,
            device_id=device if device_type == "cuda" else None,
        )
    return Ranks(rank, world, local_rank, device)


def close_ranks() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def fail_together(message: str) -> NoReturn:
    """End this rank with exit code 1, after `message` on stderr if no other rank has failed before.

    Exits without the interpreter's teardown, where communicators would wait for peers that are gone.
    """
    sys.stdout.flush()
    if _is_first_to_fail():
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(SPEAK_TIMEOUT.total_seconds())
    os._exit(1)


def _world_size_mismatch(expected: int, world: int) -> str:
    started = f"torchrun started {world}" if "RANK" in os.environ else "this is 1 process without torchrun"
    return (
        f"[parallel] tensor is {expected} and needs {expected} ranks, but {started}; start it with "
        f"`torchrun --standalone --nproc-per-node {expected} infer.py ...`, or set --parallel.tensor {world}"
    )


def _device(device_type: str, local_rank: int) -> torch.device:
    if device_type == "cpu":
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise UserError(f"rank {local_rank} of this host needs a GPU of its own, but the host has {gpus}")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _job_store(timeout: timedelta) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT: torchrun's own, or rank 0's where another launcher is used."""
    global _store
    if _store is None:
        _store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    return _store


def _is_first_to_fail() -> bool:
    try:
        return _job_store(SPEAK_TIMEOUT).add("ranks that failed", 1) == 1
    except dist.DistError:
        # Without a store nobody can know; twice the same message is better than none.
        return True
