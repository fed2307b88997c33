"""Bounded waits, and whom to blame when one ends without the others.

A rank that has waited for a second says so in the group's store. Whoever gives up looks there: a rank that
does not wait at the same reduction has died, or is held up elsewhere.
"""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

from ssm_dist.parallel.collectives.groups import Group

SLICE = 1.0
"""Seconds after which a waiting rank says so."""

GRACE = 3.0
"""Seconds that the others have to say so after one has given up: their slices end within it."""


class RankFailure(RuntimeError):
    """A reduction that could not end; the message names the op, and the ranks that were missing."""


def wait(work: dist.Work, group: Group, call: int, what: str) -> None:
    """Block until gloo's `work` is done, at most the group's timeout. Raises `RankFailure`.

    call: the reduction's number in the group; what: its name for people.
    """
    deadline = time.monotonic() + group.timeout_seconds
    while True:
        remaining = deadline - time.monotonic()
        try:
            work.wait(timedelta(seconds=max(0.001, min(SLICE, remaining))))
            return
        except RuntimeError as error:
            _say_that_it_waits(group, call)
            failed = work.is_completed()
            if failed or time.monotonic() >= deadline:
                reason = str(error) if failed else f"nothing for {group.timeout_seconds:g} s"
                raise RankFailure(explain(group, call, what, reason)) from error


def explain(group: Group, call: int, what: str, reason: str) -> str:
    """The message of a reduction that did not end, after the others had time to say that they wait."""
    time.sleep(GRACE)
    missing = [rank for rank in range(group.size) if rank != group.rank and not _waits(group, rank, call)]
    blamed = f"rank {', '.join(map(str, missing))}" if missing else "no rank"
    return (
        f"{what} (reduction {call} of group {group.name!r}) did not end on rank {group.rank}: {reason}. "
        f"Missing: {blamed} of {group.size}, dead or held up elsewhere; [reduction] timeout_seconds says how "
        "long to wait"
    )


def _say_that_it_waits(group: Group, call: int) -> None:
    _get_process_group_store(group.handle).set(f"waiting {group.rank}", str(call))


def _waits(group: Group, rank: int, call: int) -> bool:
    """Whether a rank waits at this reduction or a later one."""
    store, key = _get_process_group_store(group.handle), f"waiting {rank}"
    try:
        return store.check([key]) and int(store.get(key)) >= call
    except dist.DistError:  # the store's own rank is gone
        return False
