"""Requests that come and go while others run, on a model whose tokens betray every mix-up."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_dist.generation import Run
from ssm_dist.prefix_cache import PrefixCache
from ssm_dist.requests import Request
from ssm_dist.sampling.params import SamplingParams
from tests.engine.exact import HYBRID, PURE, exact_continuation, exact_engine


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: list[int]
    new: int
    cancelled_at: int | None


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        st.integers(0, 25),
        st.lists(st.integers(0, 22), min_size=1, max_size=40),
        st.integers(1, 12),
        st.none() | st.integers(0, 30),
    ),
    min_size=1,
    max_size=9,
)


def drive(run: Run, arrivals: list[Arrival]) -> tuple[dict[int, list[int]], dict[int, str]]:
    """Tokens and finish reasons of all requests, each arriving and leaving at its step."""
    tokens: dict[int, list[int]] = {i: [] for i in range(len(arrivals))}
    reasons: dict[int, str] = {}
    for step in range(2000):
        events = []
        for index, a in enumerate(arrivals):
            if a.step == step:
                run.add(Request(index, None, a.prompt, SamplingParams(max_new_tokens=a.new)))
        for index, a in enumerate(arrivals):
            if a.cancelled_at == step and (event := run.cancel(index)) is not None:
                events.append(event)
        events += run.execute(run.plan())
        for event in events:
            assert event.index not in reasons
            tokens[event.index] += [] if event.token_id is None else [event.token_id]
            if event.finish_reason is not None:
                reasons[event.index] = event.finish_reason
        if step > 40 and not run.active:
            break
    assert not run.active
    return tokens, reasons


@settings(deadline=None, max_examples=60)
@given(ARRIVALS, st.integers(1, 4), st.integers(1, 20), st.booleans())
def test_every_request_ends_with_the_tokens_it_has_alone(arrivals, slots, chunk_tokens, paged):
    engine = exact_engine(HYBRID if paged else PURE, slots, 64)
    tokens, reasons = drive(Run(engine, PrefixCache(engine.cache), None, (), chunk_tokens), arrivals)
    for index, a in enumerate(arrivals):
        alone = exact_continuation(a.prompt, a.new, paged=paged)
        if a.cancelled_at is None:
            assert tokens[index] == alone and reasons[index] == "length"
        else:
            assert tokens[index] == alone[: len(tokens[index])]
            assert a.cancelled_at < a.step or reasons[index] in ("length", "cancelled")
    assert engine.cache.free_slots == slots
    assert not paged or engine.cache.acquire(64) is not None


def test_thousands_of_requests_leave_nothing_behind():
    engine = exact_engine(HYBRID, 8, 256)
    run = Run(engine, PrefixCache(engine.cache), None, (), 64)
    ended = 0
    for index in range(2000):
        prompt = [index % 23] * (1 + index * 7 % 30)
        run.add(Request(index, None, prompt, SamplingParams(max_new_tokens=1 + index % 4)))
        if index % 5 == 4:
            ended += run.cancel(index - 2) is not None
        if index % 2:
            ended += sum(event.finish_reason is not None for event in run.execute(run.plan()))
    while run.active:
        ended += sum(event.finish_reason is not None for event in run.execute(run.plan()))
    assert ended == 2000 and not run.active
    assert run._streams == {} and engine.sampler._admitted == {}
    assert engine.cache.free_slots == 8 and engine.cache.acquire(256) is not None


def test_between_two_tokens_of_a_running_request_lies_at_most_one_chunk():
    engine = exact_engine(PURE, 6, 1)
    run = Run(engine, PrefixCache(engine.cache), None, (), 8)
    run.add(Request(0, None, [1], SamplingParams(max_new_tokens=30)))
    work, since = [], 0
    for index in range(1, 60):
        run.add(Request(index, None, [2] * 50, SamplingParams(max_new_tokens=1)))
        if 0 not in run.indices:
            break
        step = run.plan()
        assert step is not None
        since += sum(c.length for c in step.chunks)
        if any(event.index == 0 for event in run.execute(step)):
            work.append(since)
            since = 0
    assert max(work) <= 8 + 6
