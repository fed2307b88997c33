"""Steps worked on in two halves, whose sums over ranks overlap: the answers are those of whole steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ssm_dist.capture import overlap_tokens
from ssm_dist.config import Config, ModelConfig, PrefillConfig, ReductionConfig
from ssm_dist.packing import split
from ssm_dist.sampling.params import SamplingParams
from ssm_dist.scheduler import Chunk, Sequence
from tests.engine.checkpoints import save_checkpoint
from tests.engine.in_halves import answers
from tests.ranks import run_on_ranks


@pytest.mark.parametrize("degree", [2, 3])
def test_halves_in_turns_give_the_bits_of_one_after_the_other(degree: int, tmp_path: Path) -> None:
    """A half ends between two sequences, or within one that goes on in the other half.

    A product of fewer rows may add up in another order: of whole steps, the numbers agree up to rounding.
    """
    names = ["mamba", "falcon_mamba", "zamba"] if degree == 2 else ["mamba"]
    folders = {name: save_checkpoint(name, tmp_path / name) for name in names}
    for found in run_on_ranks(degree, answers, folders, {}):
        for name in names:
            assert found[name].in_turns == found[name].after_each_other and found[name].pairs > 3
            assert found[name].beside >= 2 * found[name].pairs  # at least a layer's sum of either half
            for (tokens, logprobs), (other, others) in zip(
                found[name].in_turns, found[name].whole, strict=True
            ):
                assert tokens == other and logprobs == pytest.approx(others, abs=1e-5)


def test_halves_in_turns_with_error_feedback_give_the_same_bits(tmp_path: Path) -> None:
    folders = {name: save_checkpoint(name, tmp_path / name) for name in ("mamba", "zamba")}
    feedback = {"codec": "int4", "algorithm": "exchange", "feedback": True}
    for found in run_on_ranks(2, answers, folders, feedback):
        for name in folders:
            assert found[name].in_turns == found[name].after_each_other and found[name].pairs > 3
            assert found[name].beside >= 2 * found[name].pairs


def chunk(length: int, start: int = 0) -> Chunk:
    return Chunk(Sequence(0, [1] * (start + length), SamplingParams()), start, length)


@pytest.mark.parametrize("tokens", range(13))
def test_a_split_keeps_every_token_in_its_order(tokens: int) -> None:
    chunks = [chunk(5, 3), chunk(1), chunk(6)]
    first, rest = split(chunks, tokens)
    assert sum(c.length for c in first) == tokens and all(c.length for c in [*first, *rest])

    def places(some: list[Chunk]) -> list[Any]:
        return [(id(c.sequence), place) for c in some for place in range(c.start, c.end)]

    assert places([*first, *rest]) == places(chunks)


@pytest.mark.parametrize(
    ("codec", "asked", "expected"),
    [("none", None, 8192), ("int8", None, 32768), ("none", 0, 0), ("int8", 5, 5)],
)
def test_exact_sums_are_hidden_in_shorter_steps_than_quantised_ones(
    codec: Any, asked: int | None, expected: int
) -> None:
    config = Config(
        model=ModelConfig(preset="mamba-2.8b"),
        reduction=ReductionConfig(codec=codec),
        prefill=PrefillConfig(overlap_tokens=asked),
    )
    assert overlap_tokens(config) == expected
