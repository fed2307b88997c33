"""Who holds which page of keys and values: sequences that run, and snapshots that are kept."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Pages by number, counted by their holders; a page is free when nobody holds it."""

    def __init__(self, pages: int) -> None:
        self._free = list(reversed(range(pages)))
        self._users = [0] * pages
        self._keepers = [0] * pages
        self.reclaimable = 0
        """Pages that only snapshots hold: they come free when the snapshots go."""

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Free pages, in use from now on."""
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._users[page] = 1
        return pages

    def use(self, pages: Iterable[int]) -> None:
        """One sequence more reads these pages, which somebody holds."""
        for page in pages:
            assert self._users[page] or self._keepers[page]
            self.reclaimable -= self._users[page] == 0
            self._users[page] += 1

    def leave(self, pages: Iterable[int]) -> None:
        """One sequence fewer."""
        for page in pages:
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free_or_reclaimable(page)

    def keep(self, pages: Iterable[int]) -> None:
        """One snapshot more holds these pages, which a sequence uses."""
        for page in pages:
            assert self._users[page], "a snapshot is taken of a sequence that runs"
            self._keepers[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """One snapshot fewer."""
        for page in pages:
            self._keepers[page] -= 1
            if self._users[page] == 0 and self._keepers[page] == 0:
                self.reclaimable -= 1
                self._free.append(page)

    def _free_or_reclaimable(self, page: int) -> None:
        if self._keepers[page]:
            self.reclaimable += 1
        else:
            self._free.append(page)
