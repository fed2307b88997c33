"""The three models on GPUs, alone and sharded over NCCL, against transformers on the CPU.

Ranks take many seconds to start and to compile their kernels: they do it once a degree, for all the models,
and meanwhile this process is degree 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from ssm_dist.text import Tokenizer
from tests.engine.checkpoints import save_checkpoint
from tests.gpu.generation_on_gpus import BACKENDS, GREEDY, PROMPTS, Answers, Backend, answers
from tests.oracle import logits, random_model
from tests.ranks import start_on_ranks

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 1, reason="needs a GPU")]

NAMES = ["mamba", "falcon_mamba", "zamba"]
DEGREES = [1, 2, 4]
ByRank = list[dict[tuple[str, Backend], Answers]]

oracle: Callable[[str], PreTrainedModel] = cache(random_model)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], ByRank]:
    """From a degree to what its ranks answered."""
    folders = {name: save_checkpoint(name, tmp_path_factory.mktemp(name) / "model") for name in NAMES}
    started = {
        degree: start_on_ranks(degree, answers, folders, device="cuda", timeout=200.0)
        for degree in DEGREES
        if 1 < degree <= GPUS
    }

    @cache
    def at(degree: int) -> ByRank:
        return [answers(folders)] if degree == 1 else started[degree].result()

    return at


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    tokenizer = Tokenizer.from_folder(save_checkpoint("mamba", tmp_path_factory.mktemp("tokens") / "model"))
    assert tokenizer is not None
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("degree", DEGREES)
def test_generation_and_scores_are_those_of_transformers(
    degree: int, name: str, backend: Backend, runs: Callable[[int], ByRank], prompts: list[list[int]]
) -> None:
    """Every token is the oracle's likeliest after those before it; all of them are read at once."""
    if degree > GPUS:
        pytest.skip(f"needs {degree} GPUs")
    token_ids, log_probs = runs(degree)[0][name, backend]
    assert all(rank[name, backend] == (token_ids, log_probs) for rank in runs(degree))
    for prompt, answer in zip(prompts, token_ids, strict=True):
        likeliest = logits(oracle(name), prompt + answer).argmax(-1)
        assert len(answer) == GREEDY.max_new_tokens
        assert answer == likeliest[len(prompt) - 1 : -1].tolist()
    scores = logits(oracle(name), prompts[2]).log_softmax(-1)[:-1]
    wanted = scores.gather(1, torch.tensor(prompts[2][1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(log_probs), wanted, atol=1e-4, rtol=0)
