"""The three models on GPUs, alone and sharded over NCCL, against transformers on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssm_dist import LLM, SamplingParams
from ssm_dist.text import Tokenizer
from tests.engine.checkpoints import save_checkpoint
from tests.oracle import greedy, logits, random_model
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.gpu

NAMES = ["mamba", "falcon_mamba", "zamba"]
PROMPTS = ["def f(x):", "a", "import os, sys; print(1)"]
GREEDY = SamplingParams(max_new_tokens=64, ignore_eos=True)


def answers(folder: Path, backend: str) -> tuple[list[list[int]], list[float]]:
    llm = LLM.from_pretrained(
        folder, kernels={"backend": backend}, cache={"max_sequences": 2}, prefill={"chunk_tokens": 8}
    )
    assert llm.loaded.device.type == "cuda"
    return [c.token_ids for c in llm.generate(PROMPTS, GREEDY)], llm.score([PROMPTS[2]])[0].log_probs


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_generation_and_scores_are_those_of_transformers(
    name: str, degree: int, backend: str, tmp_path: Path
):
    if torch.cuda.device_count() < degree:
        pytest.skip(f"needs {degree} GPUs")
    folder, oracle = save_checkpoint(name, tmp_path / name), random_model(name)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    wanted = [greedy(oracle, ids, GREEDY.max_new_tokens) for ids in prompts]
    scores = logits(oracle, prompts[2]).log_softmax(-1)[:-1]
    scores = scores.gather(1, torch.tensor(prompts[2][1:])[:, None])[:, 0]
    for token_ids, log_probs in run_on_ranks(degree, answers, folder, backend, device="cuda"):
        assert token_ids == wanted
        torch.testing.assert_close(torch.tensor(log_probs), scores, atol=1e-4, rtol=0)
