"""What every rank does for `test_halves`; here, so that ranks need not import transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssm_dist import LLM, SamplingParams

PROMPTS: list[Any] = [[(5 * i + j) % 50 for j in range(n)] for i, n in enumerate((900, 300, 40, 1, 700, 83))]
PARAMS = SamplingParams(max_new_tokens=3, ignore_eos=True, logprobs=0)
TIMES = 4
"""A step is captured when it comes for the second time, and replayed after that."""

Answers = list[tuple[list[int], list[float]]]


def whole_answers(folder: Path) -> Answers:
    """Those of one GPU."""
    llm = LLM.from_pretrained(folder, kernels={"backend": "triton"}, compile={"mode": "none"})
    return [(c.token_ids, c.logprobs) for c in llm.generate(PROMPTS, PARAMS)]


def answers(folders: dict[str, Path], algorithm: str) -> dict[str, dict[str, dict[str, list[Answers]]]]:
    """By model, [compile] mode and order of the halves: the same answers several times."""
    return {
        name: {mode: _answers(folder, algorithm, mode) for mode in ("none", "capture")}
        for name, folder in folders.items()
    }


def _answers(folder: Path, algorithm: str, mode: str) -> dict[str, list[Answers]]:
    in_turns, after_each_other = (_load(folder, algorithm, mode) for _ in range(2))
    interleaver = after_each_other.engine.prefill.interleaver
    interleaver.run = lambda first, second: (first(), second())  # type: ignore[method-assign,assignment]
    return {
        way: [[(c.token_ids, c.logprobs) for c in llm.generate(PROMPTS, PARAMS)] for _ in range(TIMES)]
        for way, llm in (("in turns", in_turns), ("after each other", after_each_other))
    }


def _load(folder: Path, algorithm: str, mode: str) -> LLM:
    return LLM.from_pretrained(
        folder, kernels={"backend": "triton"}, compile={"mode": mode}, reduction={"algorithm": algorithm},
        prefill={"chunk_tokens": 512, "overlap_tokens": 128},
        cache={"max_sequences": 6, "max_tokens": 4096},
    )  # fmt: skip
