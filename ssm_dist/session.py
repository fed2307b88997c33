"""Requests that come and go while others run.

Rank 0 owns arrivals, cancellations and time. Before every step it broadcasts what has happened and the step
that follows from it, as JSON; the other ranks apply the same, and check that they plan the same step.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from typing_extensions import Self

from ssm_dist.errors import UserError
from ssm_dist.generation import Collector, Completion, Run, TokenEvent
from ssm_dist.requests import Prompt, Request
from ssm_dist.sampling.params import SamplingParams
from ssm_dist.step_plans import News, apply_news, encode

HEARTBEAT = 60.0
"""Seconds of idleness after which the other ranks hear from rank 0: collectives time out."""

Deliver = Callable[[TokenEvent | Exception], None]


class Stream:
    """The answer to one request as it comes: an iterator of its events, which blocks for the next one."""

    def __init__(self, session: Session, request: Request, *, with_text: bool) -> None:
        self.request = request
        self._session = session
        self._events: queue.SimpleQueue[TokenEvent | Exception] = queue.SimpleQueue()
        self._collector = Collector([request], with_text=with_text)
        self._ended = False

    def __iter__(self) -> Iterator[TokenEvent]:
        return self

    def __next__(self) -> TokenEvent:
        if self._ended:
            raise StopIteration
        event = self._events.get()
        if isinstance(event, Exception):
            self._ended = True
            raise RuntimeError("the session has failed") from event
        self._ended = event.finish_reason is not None
        return event

    def result(self) -> Completion:
        """Wait for the end, and return the whole answer."""
        for _ in self:
            pass
        return self._collector.completions[0]

    def cancel(self) -> None:
        """End the request where it stands; its last event then says "cancelled"."""
        self._session.cancel(self.request.index)

    def deliver(self, event: TokenEvent | Exception) -> None:
        """Called by the session for every event, when it comes: that is the time which counts."""
        if not isinstance(event, Exception):
            self._collector.add(event)
        self._events.put(event)


class Session:
    """Takes requests from any thread on rank 0, and runs them in a thread of its own until it is closed."""

    def __init__(
        self,
        run: Run,
        prepare: Callable[[Prompt, SamplingParams, int], Request],
        *,
        broadcast: Callable[[bytes], object] = lambda _: None,
        enter_thread: Callable[[], None] = lambda: None,
        with_text: bool = True,
    ) -> None:
        """prepare: tokenises and checks a prompt; broadcast: sends a plan to the ranks that `follow`.

        enter_thread: called first in the session's thread, for settings that belong to a thread.
        """
        self._run, self._prepare, self._broadcast = run, prepare, broadcast
        self._with_text = with_text
        self._enter_thread = enter_thread
        self._changed = threading.Condition()
        self._news = News()
        self._open: dict[int, Deliver] = {}
        self._next_index = 0
        self._failure: Exception | None = None
        self._together = False
        """Whether the session's thread does what takes all ranks: a broadcast, or a step."""
        self._thread = threading.Thread(target=self._work, name="ssm-dist session", daemon=True)
        self._thread.start()

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Queue a prompt while others run. Raises `UserError` when it cannot run, or after `close`."""
        return self.submit_to(
            lambda request: Stream(self, request, with_text=self._with_text), prompt, params
        )

    def submit_to(self, make: Callable[[Request], Any], prompt: Prompt, params: SamplingParams | None) -> Any:
        """As `submit`, for receivers of other kinds: `make(request)` has `deliver(event)`, and is returned.

        `deliver` is called in the session's thread.
        """
        with self._changed:
            index = self._next_index
            self._next_index += 1
        request = self._prepare(prompt, SamplingParams() if params is None else params, index)
        receiver = make(request)
        with self._changed:
            if self._failure is not None:
                raise RuntimeError("the session has failed") from self._failure
            if self._news.closed:
                raise UserError("the session is closed; open another one")
            self._open[index] = receiver.deliver
            self._news.arrivals.append(request)
            self._changed.notify()
        return receiver

    def cancel(self, index: int) -> None:
        """End the request of this index where it stands; one that has ended is left alone."""
        with self._changed:
            self._news.cancelled.append(index)
            self._changed.notify()

    @property
    def closed(self) -> bool:
        """Whether it has ended, closed or failed."""
        return not self._thread.is_alive()

    def close(self, failure: str = "") -> None:
        """Cancel what still runs, and end the session on all ranks. Raises what the session has failed of.

        failure: for the other ranks to raise, when the work that the session was opened for has failed.
        """
        with self._changed:
            self._news.closed, self._news.failure = True, failure
            self._changed.notify()
        self._thread.join()
        if self._failure is not None:
            raise RuntimeError("the session has failed") from self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(_shown(error) if isinstance(error, Exception) else "")

    def _work(self) -> None:
        try:
            self._enter_thread()
            while self._turn():
                pass
        except Exception as error:
            self._fail(error)
        finally:
            self._run.close()

    def _turn(self) -> bool:
        """One round: news, plan, step; False after the last one."""
        news = self._take_news()
        self._deliver(apply_news(self._run, news))
        step = None if news.closed else self._run.plan()
        plan = encode(news, step)
        self._together = True
        self._broadcast(plan)
        events = [] if news.closed else self._run.execute(step)
        self._together = False
        self._deliver(events)
        return not news.closed

    def _take_news(self) -> News:
        with self._changed:
            if not self._run.active:
                self._changed.wait_for(lambda: self._news.any, timeout=HEARTBEAT)
            news = self._news
            self._news = News(closed=news.closed, failure=news.failure)
            return news

    def _deliver(self, events: list[TokenEvent]) -> None:
        for event in events:
            with self._changed:
                ended = event.finish_reason is not None
                deliver = self._open.pop(event.index) if ended else self._open[event.index]
            deliver(event)

    def _fail(self, error: Exception) -> None:
        """Tell everybody who waits, whoever comes, and the other ranks where they wait for a plan."""
        with self._changed:
            self._failure = error
            waiting = list(self._open.values())
            self._open.clear()
        try:
            for deliver in waiting:
                deliver(error)
        finally:
            if not self._together:  # else they stand in a reduction, which ends with this rank
                self._broadcast(encode(News(closed=True, failure=_shown(error)), None))


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
