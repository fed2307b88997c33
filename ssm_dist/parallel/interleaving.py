"""Two halves of a step that take turns: the sums over ranks of one run beside the compute of the other.

Each half is a call of the model in a thread of its own, and one of them runs at a time, up to its next sum
that can wait. It leaves that sum behind and hands over. The other half begins the sum where its own scan
follows, on a second stream, and goes on up to a sum of its own. A scan is bound by the special-function units
and leaves the links, the memory and most registers to a sum; a matrix product would not. So all sums of a
group have one order on all ranks, no two of them run at once, and the model knows nothing of it.

Nothing but the order of launches differs from running one half after the other: a sequence may even go on
from the first half into the second, whose layers each follow the same layer of the first.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import torch

from ssm_dist.parallel.collectives.groups import Group, group_named, is_registered

Result = TypeVar("Result")

_here = threading.local()
"""`half`: the half that this thread runs, if any."""


class _OtherHasFailed(Exception):
    """Ends a half whose other half has failed."""


class _Sum:
    """A sum that waits for its time, and its result after that."""

    def __init__(self, call: Callable[[], Any], group: Group) -> None:
        self.call, self.group = call, group
        self.result: Any = None
        self.begun = False
        self.done: torch.cuda.Event | None = None


class _Pair:
    """What two halves share."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream = stream
        self.left: _Sum | None = None
        self.failed = False
        self.groups: set[Group] = set()
        """Whose sums the second stream was given."""
        self.halves = (_Half(self), _Half(self))
        self.halves[0].other, self.halves[1].other = self.halves[1], self.halves[0]

    def begin_left(self, *, before_scan: bool) -> None:
        """Give the device the sum that was left, after what it has been given so far.

        before_scan: a scan is given to it next, for which the sum is to leave room.
        """
        if self.failed:
            raise _OtherHasFailed
        left, self.left = self.left, None
        if left is None:
            return
        left.begun = True
        if self.stream is None:
            left.result = left.call()
            return
        self.groups.add(left.group)
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream), left.group.leaving_room(before_scan):
            left.result = left.call()
            left.done = torch.cuda.Event()
            left.done.record(self.stream)
        left.group.in_flight = left.done

    def close(self) -> None:
        """After the end of both halves, however they ended: nothing is left to wait for or to hold."""
        self.left = None
        for group in self.groups:
            group.in_flight = None
        if self.groups and self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


class _Half:
    """One of the two."""

    other: _Half

    def __init__(self, pair: _Pair) -> None:
        self.pair = pair
        self.turn = threading.Semaphore(0)
        self.ended = False

    def run(self, call: Callable[[], Result], *, waits: bool = False) -> Result:
        """The result of `call`, whose sums may be left to wait. waits: the other half comes first."""
        _here.half = self
        try:
            if waits:
                self._wait_for_turn()
            return call()
        except BaseException:
            self.pair.failed = True
            raise
        finally:
            _here.half = None
            self.ended = True
            self.other.turn.release()

    def sum(self, call: Callable[[], Result], group: Group) -> Result:
        """`call()`, begun while the other half runs."""
        self.pair.begin_left(before_scan=False)
        mine = _Sum(call, group)
        self.pair.left = mine
        if not self.other.ended:
            self.other.turn.release()
            self._wait_for_turn()
        if not mine.begun:
            self.pair.begin_left(before_scan=False)
        if mine.done is not None:
            torch.cuda.current_stream().wait_event(mine.done)
            group.in_flight = None
        return cast(Result, mine.result)

    def _wait_for_turn(self) -> None:
        """Return when the other half has handed over, or has ended."""
        self.turn.acquire()
        if self.pair.failed:
            raise _OtherHasFailed


class Interleaver:
    """Runs pairs of calls, turn by turn; ranks that make the same calls do so in the same order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @functools.cached_property
    def _stream(self) -> torch.cuda.Stream | None:
        """Where sums run beside the other half; on a CPU nothing runs beside anything."""
        return torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    @functools.cached_property
    def _second(self) -> ThreadPoolExecutor:
        """The thread of second halves. Left to itself, it would open a context on the first GPU, too."""
        gpu = self._device.type == "cuda"
        enter = functools.partial(torch.cuda.set_device, self._device) if gpu else None
        return ThreadPoolExecutor(1, "second half", enter)

    def run(self, first: Callable[[], Result], second: Callable[[], Result]) -> tuple[Result, Result]:
        """Both results. Raises what one of them raised first."""
        pair = _Pair(self._stream)
        mine, other = pair.halves
        inference = torch.is_inference_mode_enabled()
        stream = None if self._stream is None else torch.cuda.current_stream(self._device)

        def follow() -> Result:  # these modes belong to a thread
            on_stream = contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
            with torch.inference_mode(inference), on_stream:
                return other.run(second, waits=True)

        following = self._second.submit(follow)
        try:
            return mine.run(first), following.result()
        except _OtherHasFailed:
            following.result()
            raise
        except BaseException:
            pair.failed = True
            following.exception()  # it has ended before anybody goes on
            raise
        finally:
            pair.close()


def beside(call: Callable[[], Result], group: str) -> Result:
    """A sum over `group`: `call()`, run beside the other half of a step where there is one."""
    half = _half()
    if half is None or not is_registered(group):
        return call()
    return half.sum(call, group_named(group))


def in_halves() -> bool:
    """Whether this is one of two halves of a step, which hand over where they sum."""
    return _half() is not None


def begin_left_sum() -> None:
    """Where a scan follows: begin the sum that the other half has left, if there is one."""
    half = _half()
    if half is not None:
        half.pair.begin_left(before_scan=True)


def _half() -> _Half | None:
    if torch.compiler.is_compiling():
        return None
    return getattr(_here, "half", None)
