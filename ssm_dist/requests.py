"""Prompts and the options beside them: their forms, their validation, and how ranks hand them on."""

from __future__ import annotations

import base64
import functools
import json
from array import array
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ssm_dist.errors import UserError
from ssm_dist.sampling.params import SamplingParams
from ssm_dist.text import Tokenizer

Prompt = str | list[int] | dict[str, Any]
"""A text, token ids, or {"messages": [{"role": ..., "content": ...}, ...]} for the chat template."""

PROMPT_FORMS = 'text, a list of token ids, or {"messages": [{"role": ..., "content": ...}, ...]}'


@dataclass(frozen=True)
class Request:
    """A prompt ready to run, or the reason why it cannot."""

    index: int
    prompt: str | None
    """The text as given, or as the chat template made it; None for token ids."""
    token_ids: list[int]
    params: SamplingParams
    error: str | None = None

    @functools.cached_property
    def packed(self) -> array[int]:
        """`token_ids` as unsigned numbers of 32 bits; lists of numbers are slow to go through."""
        return array("I", self.token_ids)


def prepare(
    prompt: Prompt, params: SamplingParams, index: int, tokenizer: Tokenizer | None, vocab_size: int
) -> Request:
    """Tokenise and check one prompt. Raises `UserError` that says what is wrong with it."""
    if not isinstance(params, SamplingParams):
        kind = type(params).__name__
        raise UserError(f"params must be SamplingParams, one for all or a list of one a prompt; not {kind}")
    if type(params) is not SamplingParams:  # of the configuration, whose other keys no rank would take
        params = SamplingParams.of(params)
    text: str | None = None
    if isinstance(prompt, dict):
        if "messages" not in prompt:
            raise UserError(f'this dictionary has no "messages"; a prompt is {PROMPT_FORMS}')
        text = _need(tokenizer, "a messages prompt").apply_chat_template(prompt["messages"])
        # the template spells out its special tokens, so encoding must not add them again
        token_ids = _need(tokenizer, "a messages prompt").encode(text, add_special_tokens=False)
    elif isinstance(prompt, str):
        text, token_ids = prompt, _need(tokenizer, "a text prompt").encode(prompt)
    elif isinstance(prompt, list):
        token_ids = _check_ids(prompt)
    else:
        raise _no_prompt(prompt)
    if not token_ids:
        raise UserError("the prompt is empty; give at least one token")
    request = Request(index, text, token_ids, params)
    _check_range(request, vocab_size)
    if params.stop and tokenizer is None:
        raise UserError("stop strings need a tokenizer, and this model has none; use max_new_tokens")
    return request


def _check_range(request: Request, vocab_size: int) -> None:
    """Raise `UserError` for an id that the vocabulary lacks."""
    try:
        if np.frombuffer(request.packed, np.uint32).max() < vocab_size:
            return
    except OverflowError:  # below 0, or of more than 32 bits
        pass
    ids = request.token_ids
    extreme = next(n for n in (min(ids), max(ids)) if not 0 <= n < vocab_size)
    raise UserError(f"token id {extreme} is out of range; the vocabulary has ids 0 to {vocab_size - 1}")


def to_bytes(requests: list[Request]) -> bytes:
    """Requests for other ranks: token ids as they are, behind the rest as JSON, whose size comes first."""
    plain = [_plain(request) | {"token_ids": len(request.token_ids)} for request in requests]
    head = json.dumps(plain).encode()
    ids = b"".join(request.packed.tobytes() for request in requests)
    return len(head).to_bytes(8, "little") + head + ids


def from_bytes(data: bytes) -> list[Request]:
    """The requests that `to_bytes` packed."""
    ids_at = 8 + int.from_bytes(data[:8], "little")
    requests, ids = [], memoryview(data[ids_at:]).cast("I")
    for plain in json.loads(data[8:ids_at]):
        count = plain["token_ids"]
        requests.append(_of_plain(plain, ids[:count].tolist()))
        ids = ids[count:]
    return requests


def _plain(request: Request) -> dict[str, Any]:
    plain = {field.name: getattr(request, field.name) for field in fields(request)}
    return plain | {"params": request.params.model_dump()}


def _of_plain(plain: dict[str, Any], token_ids: list[int]) -> Request:
    params = SamplingParams.model_validate(plain["params"])
    return Request(**plain | {"params": params, "token_ids": token_ids})


def request_fields(request: Request) -> dict[str, Any]:
    """A request as plain data for JSON, which is slow with numbers: the token ids are one string."""
    token_ids = base64.b64encode(request.packed.tobytes()).decode("ascii")
    return _plain(request) | {"token_ids": token_ids}


def request_of(plain: dict[str, Any]) -> Request:
    """The request that `request_fields` made plain."""
    return _of_plain(plain, array("I", base64.b64decode(plain["token_ids"])).tolist())


def as_list(prompts: Prompt | list[Prompt]) -> list[Prompt]:
    """A single prompt, token ids included, as a list of one. Raises `UserError` for what is neither."""
    if isinstance(prompts, (str, dict)):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise _no_prompt(prompts)
    if prompts and isinstance(prompts[0], int):
        return [prompts]
    return list(prompts)  # type: ignore[arg-type]


def appended(history: list[int], prompt: Prompt, tokenizer: Tokenizer | None) -> list[int]:
    """Token ids of a history and a prompt after it; text is taken as it is, without special tokens.

    Raises `UserError` for a prompt of another kind.
    """
    if isinstance(prompt, dict):
        raise UserError("a prompt after a state is text or token ids; apply the chat template first")
    if isinstance(prompt, list):
        return history + prompt
    if not isinstance(prompt, str):
        raise _no_prompt(prompt)
    more = _need(tokenizer, "a text prompt").encode(prompt, add_special_tokens=False) if prompt else []
    return history + more


def _need(tokenizer: Tokenizer | None, what: str) -> Tokenizer:
    if tokenizer is None:
        raise UserError(
            f"{what} needs a tokenizer, and this model has no tokenizer.json; give token ids instead, in a "
            'generation.prompts_file: {"prompt_token_ids": [...]}'
        )
    return tokenizer


def _no_prompt(given: object) -> UserError:
    return UserError(f"a prompt is {PROMPT_FORMS}, several are a list of these; not {type(given).__name__}")


def _check_ids(prompt: list[Any]) -> list[int]:
    if set(map(type, prompt)) - {int}:
        raise UserError("prompt_token_ids must be a list of integers")
    return list(prompt)  # the caller's may change while the request runs
