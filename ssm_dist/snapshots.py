"""One remembered state, and one level of the memory that such states live in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssm_dist.prefix_index import Node
from ssm_dist.state_cache import HostState, Kept


@dataclass(eq=False)
class Snapshot:
    """A state after a known beginning, wherever it is held; on the device and below at once if pinned."""

    node: Node[Snapshot]
    """Its place in the index."""
    tokens: int
    kept: Kept | None = None
    host: HostState | None = None
    file: Path | None = None
    pinned: bool = False
    """Held on the host until it is removed, outside the budgets."""

    @property
    def lost(self) -> bool:
        """Whether no level holds it."""
        return self.kept is None and self.host is None and self.file is None


class Tier:
    """The snapshots of one level, least recently used first, and their bytes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self._sizes: dict[Snapshot, int] = {}

    def add(self, snapshot: Snapshot, size: int) -> None:
        """Take in a snapshot, as the most recently used."""
        self._sizes[snapshot] = size
        self.used += size

    def remove(self, snapshot: Snapshot) -> int:
        """Let go of a snapshot, if it is here; its bytes."""
        size = self._sizes.pop(snapshot, 0)
        self.used -= size
        return size

    def touch(self, snapshot: Snapshot) -> None:
        """Make a snapshot the most recently used, if it is here."""
        if snapshot in self._sizes:
            self._sizes[snapshot] = self._sizes.pop(snapshot)

    def others(self, protected: Snapshot | None) -> bool:
        """Whether a snapshot other than `protected` is here."""
        return len(self._sizes) > (protected in self._sizes)

    def oldest(self, protected: Snapshot | None = None) -> Snapshot:
        """The least recently used snapshot other than `protected`."""
        return next(snapshot for snapshot in self._sizes if snapshot is not protected)
