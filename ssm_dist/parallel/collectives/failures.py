"""Bounded waits, and whom to blame when one ends without the others.

A rank that has waited for a second says so in the group's store, and takes it back when the wait ends.
Whoever gives up looks there: a rank that does not wait at the same reduction has died, or is held up
elsewhere.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

from ssm_dist.errors import RankFailure
from ssm_dist.parallel.collectives.groups import Group, group_named, group_with_parts

SLICE = 1.0
"""Seconds after which a waiting rank says so."""

GRACE = 3.0
"""Seconds that the others have to say so after one has given up: their slices end within it."""

BUSY = 0.05
"""Seconds that a host looks for the end of a step without pause."""

ALGORITHMS = {1: "one_shot", 2: "two_shot", 3: "bulk", 4: "decode_layers"}
"""By the error word of shared memory, divided by 64; the rest of it is the missing rank."""


@dataclass(frozen=True)
class Call:
    """One reduction, for messages."""

    group: Group
    number: int
    """In its group, the same on all ranks."""
    what: str

    @classmethod
    def of(cls, group: Group, name: str, x: torch.Tensor) -> Call:
        """The group's latest reduction, of x."""
        return cls(group, group.calls, f"{name} of {tuple(x.shape)} {str(x.dtype)[6:]}")


def wait(work: dist.Work, call: Call) -> None:
    """Block until gloo's `work` is done, at most the group's timeout. Raises `RankFailure`."""
    limit, said = call.group.timeout_seconds, False
    deadline = time.monotonic() + limit
    while True:
        try:
            work.wait(timedelta(seconds=max(0.001, min(SLICE, deadline - time.monotonic()))))
        except RuntimeError as error:
            _say(call, waits=True)
            said = True
            failed = work.is_completed()
            if failed or time.monotonic() >= deadline:
                raise _failure(call, str(error) if failed else f"nothing for {limit:g} s") from error
        else:
            break
    if said:
        _say(call, waits=False)


def wait_for_device(name: str, device: torch.device) -> None:
    """`wait_for_event` for all that a device was given so far. On a CPU nothing is ever left to do."""
    if device.type == "cuda":
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(device))
        wait_for_event(name, done)


def wait_for_event(name: str, event: torch.cuda.Event) -> None:
    """Wait until a device has reached an event, at most the timeout of the named group.

    To be called before a step's results are read, where another rank's failure would leave this one waiting
    for ever, or with results of no use. Raises `RankFailure`.
    """
    group = group_named(name)
    call = Call(group, group.calls, "a step")
    begun, said = time.monotonic(), 0.0
    while not event.query():
        waited = time.monotonic() - begun
        if waited - said > SLICE:
            _say(call, waits=True)
            said = waited
        if waited > group.timeout_seconds + GRACE:
            raise _failure(call, f"nothing for {group.timeout_seconds:g} s")
        time.sleep(0.0 if waited < BUSY else 1e-4)
    _raise_failed_waits(name)
    if said:
        _say(call, waits=False)


def _raise_failed_waits(name: str) -> None:
    """Raise if a kernel over memory that a group, or a part of it, shares has waited in vain."""
    for group in group_with_parts(name):
        opened = [memory for memory in (group.memory, *group.outgrown) if memory is not None]
        word = max((int(memory.error) for memory in opened), default=0)  # in the host's memory
        if word:
            call = Call(group, group.calls, "a step")
            _say(call, waits=True)
            source = f"rank {word % 64} for {group.timeout_seconds:g} s"
            raise _failure(call, f"{ALGORITHMS[word // 64]} over shared memory got nothing from {source}")


def _failure(call: Call, reason: str) -> RankFailure:
    """The error of a reduction that did not end, after the others had time to say that they wait."""
    group = call.group
    time.sleep(GRACE)
    missing = [rank for rank in range(group.size) if rank != group.rank and not _waits(call, rank)]
    blamed = f"rank {', '.join(map(str, missing))}" if missing else "no rank"
    return RankFailure(
        f"{call.what} (reduction {call.number} of group {group.name!r}) did not end on rank {group.rank}: "
        f"{reason}. Missing: {blamed} of {group.size}, dead or held up elsewhere; [reduction] "
        "timeout_seconds says how long to wait"
    )


def _say(call: Call, waits: bool) -> None:
    """Tell the others that this rank waits, or no longer does."""
    store = _get_process_group_store(call.group.handle)
    store.set(f"{call.group.name} waiting {call.group.rank}", str(call.number if waits else -1))


def _waits(call: Call, rank: int) -> bool:
    """Whether a rank waits at this reduction or a later one."""
    store, key = _get_process_group_store(call.group.handle), f"{call.group.name} waiting {rank}"
    try:
        return store.check([key]) and int(store.get(key)) >= call.number
    except dist.DistError:  # the store's own rank is gone
        return False
