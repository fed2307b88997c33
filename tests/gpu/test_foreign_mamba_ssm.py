"""mamba-ssm's own class under our plan, where that package is installed: the same as in one process.

Its kernels need a GPU, and what this process computes is the model as it is.
"""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.gpu import mamba_ssm_on_gpus as on_gpus
from tests.ranks import run_on_ranks, start_on_ranks

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")]

DEGREES = [2, 4]
ByName = dict[str, on_gpus.Answers]


@pytest.fixture(scope="module", autouse=True)
def package_is_there() -> None:
    pytest.importorskip("mamba_ssm", exc_type=ImportError)


@pytest.fixture(scope="module")
def runs(package_is_there: None) -> tuple[ByName, dict[int, list[ByName]]]:
    """What one process found, and what the ranks of each degree did meanwhile."""
    started = {
        n: start_on_ranks(n, on_gpus.answers, "cuda", device="cuda", timeout=200.0)
        for n in DEGREES
        if n <= GPUS
    }
    return on_gpus.answers("cuda"), {degree: ranks.result() for degree, ranks in started.items()}


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("name", on_gpus.MODELS)
def test_logits_and_32_greedy_tokens_are_those_of_one_process(
    name: str, degree: int, runs: tuple[ByName, dict[int, list[ByName]]]
) -> None:
    if degree > GPUS:
        pytest.skip(f"needs {degree} GPUs")
    whole, sharded = runs
    ranks = [rank[name] for rank in sharded[degree]]
    expected, tokens = whole[name]
    for logits, written in ranks:
        assert_close(logits, expected, rtol=0, atol=1e-4)
        assert torch.equal(logits, ranks[0][0])
        assert written == tokens


def test_its_cuda_graph_replays_the_sums_of_the_ranks(runs: tuple[ByName, dict[int, list[ByName]]]) -> None:
    name = "fused-norms-tied-head"
    for written in run_on_ranks(2, on_gpus.replayed, name, device="cuda"):
        assert written == runs[0][name][1]
