"""The loop from requests to tokens, and what comes out of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from ssm_dist.engine import Engine, Pending
from ssm_dist.errors import UserError
from ssm_dist.prefix_cache import PrefixCache
from ssm_dist.requests import Request
from ssm_dist.sampling.sampler import Sampled
from ssm_dist.scheduler import Scheduler, Sequence, Step
from ssm_dist.text import TextStream, Tokenizer

NO_ROOM = (
    "streams that are half-read hold the slots of [cache] max_sequences, or the pages of max_tokens; "
    "read one to its end, or close it"
)


@dataclass(slots=True)
class TokenEvent:
    """One new token of one request, or the news that a request cannot run."""

    index: int
    """Of the request."""
    token_id: int | None = None
    text: str = ""
    """What may be shown now: whole characters, nothing that a stop string may still cut off."""
    finish_reason: str | None = None
    """None while it runs; "stop" (end of sequence or a stop string), "length", "cancelled" or "error"."""
    error: str | None = None
    logprob: float | None = None
    """Natural logarithm of the token's probability, when asked for."""
    top_logprobs: dict[int, float] | None = None
    """The most likely tokens, as many as asked for."""


@dataclass
class Completion:
    """The whole answer to one request."""

    index: int
    prompt: str | None
    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str | None = None
    """None without a tokenizer."""
    finish_reason: str | None = None
    error: str | None = None
    logprobs: list[float] = field(default_factory=list)
    """One a token, when asked for."""
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    seconds_to_first_token: float | None = None
    """From the start of the run, or of a session's request, to the first token, waiting included."""
    seconds: float | None = None
    """From the same moment to the last token."""


class Collector:
    """Gathers events into completions, with the times at which they came."""

    def __init__(self, requests: Iterable[Request], *, with_text: bool) -> None:
        self._begin = time.perf_counter()
        self._completions = {
            r.index: Completion(r.index, r.prompt, r.token_ids, text="" if with_text else None)
            for r in requests
        }

    @property
    def completions(self) -> list[Completion]:
        """In the order of the requests."""
        return list(self._completions.values())

    def add(self, event: TokenEvent) -> None:
        """Take in one event."""
        completion, now = self._completions[event.index], time.perf_counter() - self._begin
        if event.token_id is not None:
            completion.token_ids.append(event.token_id)
            completion.seconds = now
            if completion.seconds_to_first_token is None:
                completion.seconds_to_first_token = now
        if completion.text is not None:
            completion.text += event.text
        if event.logprob is not None and event.top_logprobs is not None:
            completion.logprobs.append(event.logprob)
            completion.top_logprobs.append(event.top_logprobs)
        completion.finish_reason, completion.error = event.finish_reason, event.error


class Run:
    """Requests on their way through the engine; more may come, and some may go, between steps.

    Each turn plans a step and executes it. Tokens are read a turn late, so that the device has its next step
    before it has ended one; a request that a token ends takes part in one step more, whose token nobody gets.
    Snapshots of answers need the state right after their last token, so with them tokens are read at once.
    """

    def __init__(
        self,
        engine: Engine,
        prefixes: PrefixCache,
        tokenizer: Tokenizer | None,
        eos_ids: Iterable[int],
        chunk_tokens: int,
    ) -> None:
        self._engine, self._prefixes = engine, prefixes
        self._tokenizer = tokenizer
        self._eos_ids = frozenset(eos_ids)
        self._scheduler = Scheduler(prefixes, chunk_tokens)
        self._late = 1 if prefixes.limits is None else 0
        self._pending: deque[Pending] = deque()
        self._active: dict[int, Sequence] = {}
        self._streams: dict[int, TextStream] = {}

    @property
    def active(self) -> bool:
        """Whether requests wait or run."""
        return bool(self._active)

    @property
    def ended(self) -> bool:
        """Whether no request waits or runs, and no step is on its way."""
        return not self._active and not self._pending

    @property
    def indices(self) -> list[int]:
        """Of the requests that wait or run, in order of arrival."""
        return list(self._active)

    def events(
        self, requests: Iterable[Request], on_prompt: Callable[[int, int], None] = lambda index, tokens: None
    ) -> Iterator[TokenEvent]:
        """Run all requests to their end, yielding tokens as they come. Slots are given back in any case.

        on_prompt(request, tokens) is told how much of a prompt has been read, step by step.
        """
        for request in requests:
            if request.error is not None:
                yield TokenEvent(request.index, finish_reason="error", error=request.error)
            else:
                self.add(request)
        try:
            while self._active:
                step = self.plan()
                events = self.execute(step)
                for c in step.chunks if step is not None and not step.decode else ():
                    on_prompt(c.sequence.index, c.end)
                yield from events
        finally:
            self.close()

    def add(self, request: Request) -> None:
        """Queue a request that can run; its index must differ from those of all that are active."""
        assert request.error is None and request.index not in self._active
        sequence = Sequence(request.index, request.token_ids, request.params)
        self._active[request.index] = sequence
        self._scheduler.add(sequence)
        if self._tokenizer is not None:
            self._streams[request.index] = TextStream(self._tokenizer, request.params.stop)

    def cancel(self, index: int) -> TokenEvent | None:
        """End a request where it stands; None when it has ended already."""
        if index not in self._active:
            return None
        stream = self._streams.get(index)
        text = "" if stream is None else stream.finish()
        self._end(index)
        return TokenEvent(index, text=text, finish_reason="cancelled")

    def plan(self) -> Step | None:
        """Admit what fits, and choose the next step; None when nothing is left but tokens to be read."""
        admitted, step = self._scheduler.next_step()
        for sequence in admitted:
            self._engine.sampler.admit(sequence.slot, sequence.params, sequence.prompt_ids)
        return step

    def execute(self, step: Step | None) -> list[TokenEvent]:
        """Give the device a planned step, then read the tokens that are due; they may end requests.

        Raises `UserError` when there is no step because another run holds the slots.
        """
        if step is not None:
            self._launch(step)
        elif not self._pending:
            self._require_room()
            return []
        late = self._late if step is not None else 0
        events = []
        while len(self._pending) > late:
            events += self._read(self._pending.popleft())
        return events

    def _require_room(self) -> None:
        """Raise `UserError` where requests wait for what another run holds, which goes on when it is read."""
        if self._active:
            cache = self._engine.cache
            nobody_else = cache.free_slots == cache.max_sequences
            assert not nobody_else, "requests are active, but the scheduler has nothing to do"
            raise UserError(NO_ROOM)

    def _launch(self, step: Step) -> None:
        pending = self._engine.launch(step)
        for c in [] if step.decode else step.chunks:
            self._prefixes.after_chunk(c.sequence.slot, c.sequence.prompt_ids, c.end)
        for c in pending.chunks:
            c.sequence.sampled += 1
        self._pending.append(pending)

    def _read(self, pending: Pending) -> list[TokenEvent]:
        """The tokens of a step, but for those of requests that have ended meanwhile."""
        sampled = self._engine.collect(pending)
        if sampled is None:
            return []
        events = self._events_of([c.sequence for c in pending.chunks], sampled)
        for event in events:
            if event.finish_reason is not None:
                sequence = self._active[event.index]
                # the last token sampled has not entered the state
                self._prefixes.capture(sequence.slot, sequence.prompt_ids + sequence.token_ids[:-1])
                self._end(event.index)
        return events

    def close(self) -> None:
        """End every request where it stands."""
        self._pending.clear()
        for index in list(self._active):
            self._end(index)

    def _events_of(self, sequences: list[Sequence], sampled: Sampled) -> list[TokenEvent]:
        logprobs = None if sampled.logprobs is None else sampled.logprobs.tolist()
        top_ids = None if sampled.top_ids is None else sampled.top_ids.tolist()
        top = None if sampled.top_logprobs is None else sampled.top_logprobs.tolist()
        events = []
        for row, (sequence, token_id) in enumerate(zip(sequences, sampled.ids.tolist(), strict=True)):
            if self._active.get(sequence.index) is not sequence:
                continue
            sequence.token_ids.append(token_id)
            event = TokenEvent(sequence.index, token_id, *self._text_and_end(sequence, token_id))
            wanted = sequence.params.logprobs
            if wanted is not None and logprobs is not None and top_ids is not None and top is not None:
                event.logprob = logprobs[row]
                event.top_logprobs = dict(zip(top_ids[row][:wanted], top[row][:wanted], strict=True))
            events.append(event)
        return events

    def _text_and_end(self, sequence: Sequence, token_id: int) -> tuple[str, str | None]:
        """The text that a new token completes, and why the sequence ends with it, if it does."""
        stream = self._streams.get(sequence.index)
        text = "" if stream is None else stream.push(token_id)
        reason = None
        if (stream is not None and stream.stopped is not None) or (
            token_id in self._eos_ids and not sequence.params.ignore_eos
        ):
            reason = "stop"
        elif len(sequence.token_ids) == sequence.params.max_new_tokens:
            reason = "length"
        if reason is not None and stream is not None:
            text += stream.finish()
        return text, reason

    def _end(self, index: int) -> None:
        sequence = self._active.pop(index)
        self._streams.pop(index, None)
        if sequence.slot >= 0:
            self._engine.sampler.release(sequence.slot)
        self._scheduler.finish(sequence)
