"""Captured and compiled steps against steps as written, and against prefill, over a thousand tokens.

Ranks start once a degree; meanwhile this process is degree 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.engine.checkpoints import save_checkpoint
from tests.gpu.captured_on_gpus import LENGTHS, Outcome, even_answers, outcomes
from tests.ranks import run_on_ranks, start_on_ranks

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 1, reason="needs a GPU")]

NAMES = ["mamba", "falcon_mamba", "zamba"]
DEGREES = [1, 2, 4]
ByRank = list[dict[str, Outcome]]



@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], ByRank]:
    """From a degree to what its ranks did; a degree that this host lacks is skipped."""
    folders = {name: save_checkpoint(name, tmp_path_factory.mktemp(name) / "model") for name in NAMES}
    started = {
        degree: start_on_ranks(degree, outcomes, folders, device="cuda", timeout=200.0)
        for degree in DEGREES
        if 1 < degree <= GPUS
    }

    @cache
    def at(degree: int) -> ByRank:
        if degree > GPUS:
            pytest.skip(f"needs {degree} GPUs")
        return [outcomes(folders)] if degree == 1 else started[degree].result()

    return at


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("degree", DEGREES)
def test_every_captured_step_agrees_with_prefill(
    name: str, degree: int, runs: Callable[[int], ByRank]
) -> None:
    """float32: 1e-3 covers a thousand steps of other orders of summation; a mix-up changes whole units."""
    outcome = runs(degree)[0][name]
    assert [len(ids) for ids in outcome.token_ids] == LENGTHS
    for logprobs, scores in zip(outcome.logprobs, outcome.scores, strict=True):
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(scores), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("degree", DEGREES)
def test_replayed_steps_give_the_bits_of_steps_as_written(
    name: str, degree: int, runs: Callable[[int], ByRank]
) -> None:
    outcome = runs(degree)[0][name]
    assert outcome.even["capture"] == outcome.even["none"]
    assert outcome.through_session == outcome.even["none"][0]
    assert "captured in CUDA graphs" in outcome.how


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("degree", DEGREES)
def test_all_ranks_answer_alike(name: str, degree: int, runs: Callable[[int], ByRank]) -> None:
    first, *others = (rank[name] for rank in runs(degree))
    for other in others:
        assert (other.token_ids, other.logprobs, other.even) == (first.token_ids, first.logprobs, first.even)


def test_compiled_steps_agree_with_steps_as_written(tmp_path: Path) -> None:
    """In a process of its own: compilation leaves settings behind."""
    folder = save_checkpoint("zamba", tmp_path / "model")
    ((ids, logprobs),) = run_on_ranks(1, even_answers, folder, "compile", device="cuda", timeout=150.0)
    plain_ids, plain_logprobs = even_answers(folder, "none")
    assert ids == plain_ids
    torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(plain_logprobs), atol=1e-4, rtol=0)
