"""What the ranks of `test_steps_in_halves` run."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from ssm_dist import LLM, SamplingParams
from ssm_dist.parallel import interleaving

PROMPTS: list[Any] = [[(5 * i + j) % 90 for j in range(n)] for i, n in enumerate((9, 9, 40, 1, 3, 25, 2))]
PARAMS = SamplingParams(max_new_tokens=5, ignore_eos=True, logprobs=0)


@dataclass(frozen=True)
class Answers:
    """Of one model on one rank: tokens and log-probabilities."""

    whole: list[tuple[list[int], list[float]]]
    """By steps that are not halved."""
    in_turns: list[tuple[list[int], list[float]]]
    after_each_other: list[tuple[list[int], list[float]]]
    """By the same halves, the second begun after the end of the first."""
    pairs: int
    """Steps that were halved."""
    beside: int
    """Sums of in_turns that began in the thread of the half whose sum they are not."""


def answers(folders: dict[str, Path], reduction: dict[str, Any]) -> dict[str, Answers]:
    """Of every model."""
    return {name: _answers(folder, reduction) for name, folder in folders.items()}


def _answers(folder: Path, reduction: dict[str, Any]) -> Answers:
    pairs = 0

    def one_by_one(first: Any, second: Any) -> Any:
        nonlocal pairs
        pairs += 1
        return first(), second()

    whole = _generated(_load(folder, 0, reduction))
    llm = _load(folder, 6, reduction)
    owners, beside = dict[int, int](), 0
    begin = interleaving._Pair.begin_left
    leave = interleaving._Sum.__init__

    def left(self: Any, *args: Any) -> None:
        owners[id(self)] = threading.get_ident()
        leave(self, *args)

    def begun(self: Any, *, before_scan: bool) -> None:
        nonlocal beside
        beside += before_scan and self.left is not None and owners[id(self.left)] != threading.get_ident()
        begin(self, before_scan=before_scan)

    with (
        mock.patch.multiple(interleaving._Pair, begin_left=begun),
        mock.patch.multiple(interleaving._Sum, __init__=left),
    ):
        in_turns = _generated(llm)
    llm.engine.prefill.interleaver.run = one_by_one  # type: ignore[method-assign]
    return Answers(whole, in_turns, _generated(llm), pairs, beside)


def _load(folder: Path, overlap_tokens: int, reduction: dict[str, Any]) -> LLM:
    return LLM.from_pretrained(
        folder, reduction=reduction, cache={"max_sequences": 4, "max_tokens": 512},
        prefill={"chunk_tokens": 18, "overlap_tokens": overlap_tokens},
    )  # fmt: skip


def _generated(llm: LLM) -> list[tuple[list[int], list[float]]]:
    return [(c.token_ids, c.logprobs) for c in llm.generate(PROMPTS, PARAMS)]
