"""What every rank does for `test_captured`; here, so that ranks need not import transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssm_dist import LLM, SamplingParams
from ssm_dist.session import Session

LONGEST = 1000
PROMPTS: list[Any] = [[1 + (7 * i + j) % 50 for j in range(1 + 5 * i % 43)] for i in range(16)]
LENGTHS = [LONGEST, 3, 40, 1, 17, 64, 120, 2, 33, 250, 5, 90, 11, 7, 300, 21]
EVEN: list[Any] = PROMPTS[1:5]
EVEN_PARAMS = SamplingParams(max_new_tokens=50, ignore_eos=True, logprobs=0)


@dataclass(frozen=True)
class Outcome:
    """Of one model on one rank."""

    token_ids: list[list[int]]
    """Of requests of all lengths, six at a time, that join and leave."""
    logprobs: list[list[float]]
    """Of those tokens, as the captured decode steps tell them."""
    scores: list[list[float]]
    """The same by prefill, which reads prompt and answer at once."""
    even: dict[str, tuple[list[list[int]], list[list[float]]]]
    """By [compile] mode: tokens and log-probabilities of four requests of the same length."""
    through_session: list[list[int]] | None
    """Tokens of `EVEN` through a session, on rank 0."""
    how: str


def outcomes(folders: dict[str, Path]) -> dict[str, Outcome]:
    """All checks of every model."""
    return {name: _outcome(folder) for name, folder in folders.items()}


def even_answers(folder: Path, mode: str) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and log-probabilities of four requests of the same length."""
    return _even_answers(_load(folder, mode))


def _even_answers(llm: LLM) -> tuple[list[list[int]], list[list[float]]]:
    completions = llm.generate(EVEN, EVEN_PARAMS)
    return [c.token_ids for c in completions], [c.logprobs for c in completions]


def _outcome(folder: Path) -> Outcome:
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True, logprobs=0) for n in LENGTHS]
    llm = _load(folder, "capture")
    even = {"capture": _even_answers(llm), "none": even_answers(folder, "none")}
    answered = llm.generate(PROMPTS, params)
    texts: list[Any] = [c.prompt_token_ids + c.token_ids for c in answered]
    scores = [s.log_probs[-len(c.token_ids) :] for s, c in zip(llm.score(texts), answered, strict=True)]

    def all_at_once(session: Session) -> list[list[int]]:
        streams = [session.submit(prompt, EVEN_PARAMS) for prompt in EVEN]
        return [stream.result().token_ids for stream in streams]

    return Outcome(
        [c.token_ids for c in answered],
        [c.logprobs for c in answered],
        scores,
        even,
        llm.serve(all_at_once),
        llm.engine.how,
    )


def _load(folder: Path, mode: str) -> LLM:
    return LLM.from_pretrained(
        folder, kernels={"backend": "triton"}, compile={"mode": mode}, prefill={"chunk_tokens": 32},
        cache={"max_sequences": 6, "max_tokens": 4096},
    )  # fmt: skip
