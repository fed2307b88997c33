"""Steps in two halves, whose sums run on a second stream: bits of the same halves one after the other.

With `bulk`, the residual stream is split between the ranks meanwhile.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.checkpoints import save_checkpoint
from tests.gpu.halves_on_gpus import TIMES, Answers, answers, whole_answers
from tests.ranks import run_on_ranks

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.gpu
NAMES = ["mamba", "zamba"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Answers]]:
    """Checkpoints, and the answers of one GPU."""
    folders = {name: save_checkpoint(name, tmp_path_factory.mktemp(name) / "model") for name in NAMES}
    return folders, {name: whole_answers(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("algorithm", ["bulk", "one_shot", "process_group"])
@pytest.mark.parametrize("degree", [2, 4])
def test_halves_in_turns_and_captured_give_the_bits_of_one_after_the_other(
    degree: int, algorithm: str, models: tuple[dict[str, Path], dict[str, Answers]]
) -> None:
    if degree > GPUS:
        pytest.skip(f"needs {degree} GPUs")
    folders, alone = models
    found = run_on_ranks(degree, answers, folders, algorithm, device="cuda", timeout=300.0)
    for name in NAMES:
        for mode in ("none", "capture"):  # captured steps are padded, and halved elsewhere
            expected = found[0][name][mode]["after each other"][0]
            for rank in found:
                for way, runs in rank[name][mode].items():
                    assert runs == [expected] * TIMES, (name, mode, way)
            for (ids, logprobs), (ids_alone, logprobs_alone) in zip(expected, alone[name], strict=True):
                assert ids == ids_alone
                assert logprobs == pytest.approx(logprobs_alone, abs=1e-4)
