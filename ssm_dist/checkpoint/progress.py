"""How far a long read or write has come, on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_INTERVAL = 10.0  # seconds between lines where there is no terminal


@contextmanager
def byte_progress(what: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told of bytes done. A bar on a terminal, otherwise a line now and then."""
    console = Console(stderr=True, highlight=False)
    if not show:
        yield lambda done: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.advance(task, done)
    else:
        lines = _Lines(console, what, total)
        yield lines.advance
        lines.say(f"in {time.monotonic() - lines.begun:.1f} s")


class _Lines:
    """Progress as plain lines, at most one every few seconds."""

    def __init__(self, console: Console, what: str, total: int) -> None:
        self.console, self.what, self.total, self.done = console, what, total, 0
        self.begun = self.said = time.monotonic()

    def advance(self, done: int) -> None:
        self.done += done
        if time.monotonic() - self.said > _INTERVAL:
            self.said = time.monotonic()
            self.say(f"of {self.total / 2**30:.2f} GiB")

    def say(self, rest: str) -> None:
        self.console.print(f"{self.what}: {self.done / 2**30:.2f} GiB {rest}", markup=False)
