"""From prompts to the requests that a loaded model can run, the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from ssm_dist.build import LoadedModel
from ssm_dist.errors import UserError
from ssm_dist.parallel.collectives import broadcast_bytes
from ssm_dist.requests import Prompt, Request, as_list, from_bytes, parse_line, prepare, to_bytes
from ssm_dist.sampling.params import SamplingParams
from ssm_dist.state_cache import StateCache

Item = TypeVar("Item")


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
        return self._from_rank_0(lambda pair: pair, zip(prompts, params, strict=True))

    def lines(self, lines: list[str], base: SamplingParams) -> list[Request]:
        """Requests of a prompts file's lines; one that cannot run carries its `error`."""
        return self._from_rank_0(lambda line: parse_line(line, base), lines)

    def runnable(
        self, prompts: Prompt | list[Prompt], params: SamplingParams | list[SamplingParams] | None
    ) -> list[Request]:
        """Requests of prompts that all can run; params: one for all, or one a prompt.

        Raises `UserError` for the first prompt that cannot, and for another number of params than of prompts.
        """
        listed = as_list(prompts)
        each = params if isinstance(params, list) else [params or SamplingParams()] * len(listed)
        if len(each) != len(listed):
            raise UserError(
                f"{len(listed)} prompts with {len(each)} sampling params; give one, or one a prompt"
            )
        requests = self.every(listed, each)
        for request in requests:
            if request.error is not None:
                raise UserError(f"prompt {request.index}: {request.error}")
        return requests

    def _from_rank_0(
        self, read: Callable[[Item], tuple[Prompt, SamplingParams]], items: Iterable[Item]
    ) -> list[Request]:
        """The requests of what rank 0 reads from its items, on every rank."""
        tp = self.loaded.tp
        if tp is not None and tp.rank > 0:
            return from_bytes(broadcast_bytes(b"", tp.group, self.loaded.device))
        requests = [self._or_error(read, item, index) for index, item in enumerate(items)]
        if tp is not None:
            broadcast_bytes(to_bytes(requests), tp.group, self.loaded.device)
        return requests

    def _or_error(
        self, read: Callable[[Item], tuple[Prompt, SamplingParams]], item: Item, index: int
    ) -> Request:
        """The request of an item, or one that carries the reason why it cannot run."""
        try:
            return self.one(*read(item), index)
        except UserError as error:
            return Request(index, None, [], SamplingParams(), error=str(error))
