"""The asynchronous API: every request an async iterator of its tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from ssm_dist.generation import TokenEvent
from ssm_dist.requests import Prompt, Request
from ssm_dist.sampling.params import SamplingParams
from ssm_dist.session import Session


class _AsyncStream:
    """Hands events over to the event loop in which it was made."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.events: asyncio.Queue[TokenEvent | Exception] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def deliver(self, event: TokenEvent | Exception) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class AsyncLLM:
    """Requests of coroutines, which share the machine; made from a session (`llm.session()`)."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncIterator[TokenEvent]:
        """Yield the tokens of an answer as they come. Leaving the iteration early cancels the request.

        Raises `UserError` when the prompt cannot run.
        """
        stream: _AsyncStream = self._session.submit_to(_AsyncStream, prompt, params)
        ended = False
        try:
            while not ended:
                event = await stream.events.get()
                if isinstance(event, Exception):
                    ended = True
                    raise RuntimeError("the session has failed") from event
                ended = event.finish_reason is not None
                yield event
        finally:
            if not ended:
                self._session.cancel(stream.request.index)
