"""What rank 0 tells the others before every step, as plain data, and how they follow it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ssm_dist.generation import Run, TokenEvent
from ssm_dist.requests import Request, request_fields, request_of
from ssm_dist.scheduler import Step


@dataclass
class News:
    """What has happened since the last step."""

    arrivals: list[Request] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    closed: bool = False
    failure: str = ""
    """What ended the session, if it ends before its time."""

    @property
    def any(self) -> bool:
        """Whether anything has."""
        return bool(self.arrivals or self.cancelled or self.closed)


def follow(run: Run, receive: Callable[[], bytes]) -> None:
    """Apply rank 0's plans until it closes the session; `receive` takes part in its broadcast.

    Raises RuntimeError when something has failed on rank 0.
    """
    try:
        while True:
            plan = json.loads(receive())
            news = decode_news(plan)
            apply_news(run, news)
            if news.failure:
                raise RuntimeError(f"rank 0 has ended the session: {news.failure}")
            if news.closed:
                return
            step = run.plan()
            assert describe(step) == plan["step"], f"rank 0 plans {plan['step']}, this rank {describe(step)}"
            run.execute(step)
    finally:
        run.close()


def apply_news(run: Run, news: News) -> list[TokenEvent]:
    """Arrivals, then cancellations, then the end; the events of those that end."""
    for request in news.arrivals:
        run.add(request)
    going = run.indices if news.closed else news.cancelled
    ended = [run.cancel(index) for index in going]
    return [event for event in ended if event is not None]


def encode(news: News, step: Step | None) -> bytes:
    """News, and the step that follows, as JSON."""
    arrivals = [request_fields(request) for request in news.arrivals]
    plan = {"arrivals": arrivals, "cancelled": news.cancelled, "closed": news.closed, "failure": news.failure}
    return json.dumps(plan | {"step": describe(step)}).encode()


def decode_news(plan: dict[str, Any]) -> News:
    """The news of an encoded plan."""
    arrivals = [request_of(fields) for fields in plan["arrivals"]]
    return News(arrivals, plan["cancelled"], plan["closed"], plan["failure"])


def describe(step: Step | None) -> list[Any] | None:
    """A step as plain data: whether it decodes, and (request, first position, tokens) of every chunk."""
    if step is None:
        return None
    return [step.decode, [[c.sequence.index, c.start, c.length] for c in step.chunks]]
