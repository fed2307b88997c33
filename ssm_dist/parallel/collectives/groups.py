"""Process groups by name."""

from __future__ import annotations

import atexit
import gc
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch.distributed as dist

TIMEOUT_SECONDS = 300.0
"""How long a rank waits for the others, unless told otherwise: loading may take one rank minutes more."""


@dataclass(frozen=True, eq=False)
class Group:
    """A process group as the ops know it."""

    name: str
    handle: dist.ProcessGroup
    rank: int
    size: int
    backend: str
    """nccl or gloo."""
    timeout_seconds: float
    calls: Iterator[int] = field(default_factory=itertools.count)
    """Numbers the reductions; alike on all ranks, since they make the same calls."""


_groups: dict[str, Group] = {}


@atexit.register
def _forget_groups() -> None:
    """End the threads of the process groups before the interpreter, which would abort the process.

    Modules with installed reductions refer to a mesh, and so to its groups, in cycles.
    """
    _groups.clear()
    gc.collect()


def register_group(name: str, handle: dist.ProcessGroup, timeout_seconds: float = TIMEOUT_SECONDS) -> str:
    """Make `handle` known to the ops under `name`; returns the name."""
    _groups[name] = Group(
        name, handle, dist.get_rank(handle), dist.get_world_size(handle), dist.get_backend(handle),
        timeout_seconds,
    )  # fmt: skip
    return name


def group_named(name: str) -> Group:
    """The group that was registered under `name`."""
    return _groups[name]
