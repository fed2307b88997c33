"""Process groups by name."""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from ssm_dist.parallel.collectives.shared import SharedMemory

TIMEOUT_SECONDS = 300.0
"""How long a rank waits for the others, unless told otherwise: loading may take one rank minutes more."""


@dataclass(eq=False)
class Group:
    """A process group as the ops know it."""

    name: str
    handle: dist.ProcessGroup
    rank: int
    size: int
    backend: str
    """nccl or gloo."""
    timeout_seconds: float
    calls: int = 0
    """Reductions so far; alike on all ranks, since they make the same calls."""
    memory: SharedMemory | None = None
    """What its GPUs share, once it is open; see `shared`."""
    outgrown: list[SharedMemory] = field(default_factory=list)
    """What they shared before, for shorter messages: steps captured then still use it."""
    in_flight: torch.cuda.Event | None = None
    """The end of a reduction on another stream, which the next one has to wait for."""
    leaves_room: bool = False
    """Whether a reduction that starts now is to leave room for a scan."""

    def next_call(self) -> None:
        """Count a reduction that is about to start; on the current stream it comes after all earlier ones."""
        self.calls += 1
        if self.in_flight is not None:
            torch.cuda.current_stream().wait_event(self.in_flight)

    @contextlib.contextmanager
    def leaving_room(self, wanted: bool) -> Iterator[None]:
        """Reductions that start in here leave room for a scan beside them, if that is wanted."""
        self.leaves_room = wanted
        try:
            yield
        finally:
            self.leaves_room = False


_groups: dict[str, Group] = {}

# A process group has threads, which must end before the interpreter does; else the process aborts at exit.
atexit.register(_groups.clear)


def register_group(name: str, handle: dist.ProcessGroup, timeout_seconds: float = TIMEOUT_SECONDS) -> str:
    """Make `handle` known to the ops under `name`; returns the name. What it shares already, it keeps."""
    known = _groups.get(name)
    if known is not None and known.handle is handle:
        known.timeout_seconds = timeout_seconds
        return name
    _groups[name] = Group(
        name, handle, dist.get_rank(handle), dist.get_world_size(handle), dist.get_backend(handle),
        timeout_seconds,
    )  # fmt: skip
    return name


def register_lone_rank(name: str, size: int) -> Group:
    """A group of which this is rank 0, and whose other ranks need not exist: no process group serves it."""
    _groups[name] = Group(name, cast(dist.ProcessGroup, None), 0, size, "none", TIMEOUT_SECONDS)
    return _groups[name]


def carrier(name: str) -> str:
    """What carries the sums of a group, for people."""
    group = _groups[name]
    return group.backend if group.memory is None else f"shared memory and {group.backend}"


def group_named(name: str) -> Group:
    """The group that was registered under `name`."""
    return _groups[name]


def is_registered(name: str) -> bool:
    """Whether a group has that name: those of `parallel.simulated` have names alone."""
    return name in _groups


def group_with_parts(name: str) -> list[Group]:
    """The group of that name, and those of some of its ranks that this one is in."""
    return [group for known, group in _groups.items() if known == name or known.startswith(f"{name}/")]
