"""What the ranks of these tests run; no slow imports here, since every worker makes them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.distributed as dist

from ssm_dist import LLM, SamplingParams, UserError
from ssm_dist.saved_states import SavedState
from ssm_dist.session import Session

PROMPTS = ["def", "import os", "x", "for i in range(3):", "class A:"]
PARAMS = [
    SamplingParams(max_new_tokens=6 + 2 * i, temperature=0.5 * (i % 2), seed=i, ignore_eos=True)
    for i in range(5)
]
ENDLESS = SamplingParams(max_new_tokens=400, ignore_eos=True)


def load(folder: Path, **cache: object) -> LLM:
    settings = {"max_sequences": 3, "max_tokens": 512} | cache
    return LLM.from_pretrained(folder, cache=settings, prefill={"chunk_tokens": 8})


def served(folder: Path) -> tuple[list[list[int]] | None, int]:
    """Answers that a session gives on rank 0, and the slots free at its end."""
    llm = load(folder)

    def main(session: Session) -> list[list[int]]:
        dropped = session.submit("a", ENDLESS)
        next(dropped)
        streams = [session.submit(p, s) for p, s in zip(PROMPTS, PARAMS, strict=True)]
        dropped.cancel()
        return [stream.result().token_ids for stream in streams]

    return llm.serve(main), llm.cache.free_slots


def failed(folder: Path, where: str) -> tuple[str, int, float]:
    """What serving raises when rank 0 fails between two steps, the slots free after it, and its seconds."""
    llm, begin = load(folder), time.monotonic()

    class Receiver:
        def deliver(self, event: object) -> None:
            raise ValueError("nobody listens")

    def main(session: Session) -> None:
        begun = session.submit("a", ENDLESS)
        next(begun)
        if where == "in main":
            raise ValueError("no more")
        session.submit_to(lambda request: Receiver(), "b", PARAMS[0])
        begun.result()

    with pytest.raises((RuntimeError, ValueError)) as raised:
        llm.serve(main)
    return str(raised.value), llm.cache.free_slots, time.monotonic() - begin


def served_beside_a_stream(folder: Path) -> tuple[str, int]:
    """Why serving is refused while a stream is half-read, and the answer's tokens once that is closed."""
    llm = load(folder)
    stream = llm.stream("a", ENDLESS)
    next(stream)
    with pytest.raises(UserError, match="half-read"):
        llm.serve(lambda session: None)
    stream.close()
    llm.serve(lambda session: session.submit("a", ENDLESS).cancel())
    return "half-read", len(llm.generate("a", SamplingParams(max_new_tokens=2, ignore_eos=True))[0].token_ids)


def refused_while_serving(folder: Path) -> tuple[list[int] | None, list[int]]:
    """The answer that a session gives beside calls that are refused, and one of `generate` after it."""
    llm = load(folder)

    def main(session: Session) -> list[int]:
        stream = session.submit(PROMPTS[0], PARAMS[0])
        refused = (lambda: llm.generate("b"), lambda: llm.stream("b"), lambda: llm.score("ab"), llm.session)
        for call in refused:
            with pytest.raises(UserError, match="a session is open"):
                call()
        return stream.result().token_ids

    return llm.serve(main), llm.generate(PROMPTS[1], PARAMS[1])[0].token_ids


def answered_as_configured(folder: Path) -> list[int]:
    """With the parameters of [generation], which has other keys, too."""
    llm = load(folder)
    options = llm.config.generation.model_copy(update={"max_new_tokens": 5, "ignore_eos": True})
    return llm.generate("a", options)[0].token_ids


NO_CALLS = {
    "no messages": ({"prompt": "a"}, None),
    "no prompt": (None, None),
    "fewer params": (["a", "b"], PARAMS[:1]),
    "no prompt after a state": ([None], None),
    "a bug": ("a", None),
}
"""Prompts and parameters that rank 0 cannot prepare."""


def after_a_bad_call(folder: Path, case: str) -> tuple[str, list[list[int]]]:
    """What a rank raises when rank 0, and it alone, is given one of those; and what it answers then."""
    llm, leads = load(folder), dist.get_rank() == 0
    after = SavedState([1, 2], folder) if "state" in case else None
    with pytest.MonkeyPatch.context() as patch, pytest.raises((UserError, RuntimeError, KeyError)) as raised:
        if case == "a bug" and leads:
            patch.setattr(llm.tokenizer, "encode", lambda text: {}[text])
        prompts, params = NO_CALLS[case] if leads else (["b"], None)
        llm.generate(prompts, params, after=after)
    assert raised.type is (UserError if case != "a bug" else KeyError if leads else RuntimeError)
    return str(raised.value), [c.token_ids for c in llm.generate(PROMPTS, PARAMS)]


def conversation(folder: Path, prefix_bytes: int) -> tuple[list[list[int]], int, int]:
    """The answers of three turns, and hits and tokens saved on the way."""
    llm = load(folder, prefix_device_bytes=prefix_bytes, prefix_host_bytes=prefix_bytes, prefix_interval=8)
    history, answers = list(range(1, 20)), []
    for turn in range(3):
        answer = llm.generate([history], SamplingParams(max_new_tokens=6, ignore_eos=True))[0].token_ids
        answers.append(answer)
        history = [*history, *answer, 40 + turn]
    return answers, llm.prefixes.counters.hits, llm.prefixes.counters.tokens_saved


HISTORY = [(7 * i) % 90 for i in range(41)]


def save(folder: Path, file: Path) -> list[int]:
    """Save the state after `HISTORY`, and continue it without the file."""
    llm = load(folder)
    llm.save_state(file, HISTORY)
    return llm.generate([HISTORY], SamplingParams(max_new_tokens=9, ignore_eos=True))[0].token_ids


def resume(folder: Path, file: Path) -> tuple[list[int], int]:
    """Continue a file's state; and the tokens that were not computed again."""
    llm = load(folder)
    state = llm.load_state(file)
    params = SamplingParams(max_new_tokens=9, ignore_eos=True)
    tokens = llm.generate("", params, after=state)[0].token_ids
    saved = llm.prefixes.counters.tokens_saved
    llm.forget_state(state)
    assert llm.generate("", params, after=state)[0].token_ids == tokens
    assert llm.prefixes.counters.tokens_saved == saved and llm.cache.free_slots == 3
    return tokens, saved
