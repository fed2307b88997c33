"""From prompts to the requests that a loaded model can run, the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from ssm_dist.build import LoadedModel
from ssm_dist.errors import UserError
from ssm_dist.parallel.collectives import broadcast_bytes
from ssm_dist.prompts_file import parse_line
from ssm_dist.requests import Prompt, Request, appended, as_list, from_bytes, prepare, to_bytes
from ssm_dist.sampling.params import SamplingParams
from ssm_dist.state_cache import StateCache

Item = TypeVar("Item")

_MADE, _REFUSED, _FAILED = b"m", b"r", b"f"
"""What follows in rank 0's broadcast: requests, the text of a `UserError`, or what else it has met."""


@dataclass(frozen=True)
class Preparer:
    """Tokenises prompts, and checks them against a model and its state cache.

    Of several prompts, those of rank 0 count: every rank makes the same call, and gets the same requests.
    """

    loaded: LoadedModel
    cache: StateCache

    def one(self, prompt: Prompt, params: SamplingParams, index: int) -> Request:
        """The request of one prompt, on this rank alone. Raises `UserError` when it cannot run."""
        request = prepare(prompt, params, index, self.loaded.tokenizer, self.loaded.config.vocab_size)
        most = len(request.token_ids) + params.max_new_tokens - 1
        if self.cache.paged and most > self.cache.max_tokens:
            raise UserError(
                f"a prompt of {len(request.token_ids)} tokens with max_new_tokens = {params.max_new_tokens} "
                f"may need {most} tokens of keys and values; [cache] max_tokens is {self.cache.max_tokens}"
            )
        return request

    def every(self, prompts: list[Prompt], params: list[SamplingParams]) -> list[Request]:
        """Requests of prompts; one that cannot run carries its `error`."""
        return self._from_rank_0(lambda: self._each(lambda pair: pair, zip(prompts, params, strict=True)))

    def lines(self, lines: list[str], base: SamplingParams) -> list[Request]:
        """Requests of a prompts file's lines; one that cannot run carries its `error`."""
        return self._from_rank_0(lambda: self._each(lambda line: parse_line(line, base), lines))

    def runnable(
        self,
        prompts: Prompt | list[Prompt],
        params: SamplingParams | list[SamplingParams] | None,
        history: list[int] | None = None,
    ) -> list[Request]:
        """Requests of prompts that all can run; params: one for all, or one a prompt.

        history: tokens that every prompt comes after, see `appended`. Raises `UserError` for the first prompt
        that cannot run, and for another number of params than of prompts.
        """
        requests = self._from_rank_0(lambda: self._listed(prompts, params, history))
        for request in requests:
            if request.error is not None:
                raise UserError(f"prompt {request.index}: {request.error}")
        return requests

    def _from_rank_0(self, make: Callable[[], list[Request]]) -> list[Request]:
        """The requests that rank 0 makes, on every rank; when it cannot make them, every rank raises."""
        tp = self.loaded.tp
        if tp is None:
            return make()
        if tp.rank > 0:
            told = broadcast_bytes(b"", tp.group, self.loaded.device)
            outcome, rest = told[:1], told[1:]
            if outcome == _REFUSED:
                raise UserError(rest.decode())
            if outcome == _FAILED:
                raise RuntimeError(f"rank 0 has failed to prepare the prompts: {rest.decode()}")
            return from_bytes(rest)
        try:
            requests = make()
            told = _MADE + to_bytes(requests)
        except Exception as error:
            outcome, said = (_REFUSED, str(error)) if isinstance(error, UserError) else (_FAILED, repr(error))
            broadcast_bytes(outcome + said.encode(errors="replace"), tp.group, self.loaded.device)
            raise
        broadcast_bytes(told, tp.group, self.loaded.device)
        return requests

    def _listed(
        self,
        prompts: Prompt | list[Prompt],
        params: SamplingParams | list[SamplingParams] | None,
        history: list[int] | None,
    ) -> list[Request]:
        """As `runnable`, on this rank alone; a prompt that cannot run carries its `error`."""
        listed = as_list(prompts)
        given = SamplingParams() if params is None else params
        each = given if isinstance(given, list) else [given] * len(listed)
        if len(each) != len(listed):
            raise UserError(
                f"{len(listed)} prompts with {len(each)} sampling params; give one, or one a prompt"
            )

        def read(pair: tuple[Prompt, SamplingParams]) -> tuple[Prompt, SamplingParams]:
            prompt, sampling = pair
            return prompt if history is None else appended(history, prompt, self.loaded.tokenizer), sampling

        return self._each(read, zip(listed, each, strict=True))

    def _each(
        self, read: Callable[[Item], tuple[Prompt, SamplingParams]], items: Iterable[Item]
    ) -> list[Request]:
        """The requests of what is read from items, on this rank alone."""
        return [self._or_error(read, item, index) for index, item in enumerate(items)]

    def _or_error(
        self, read: Callable[[Item], tuple[Prompt, SamplingParams]], item: Item, index: int
    ) -> Request:
        """The request of an item, or one that carries the reason why it cannot run."""
        try:
            return self.one(*read(item), index)
        except UserError as error:
            return Request(index, None, [], SamplingParams(), error=str(error))
