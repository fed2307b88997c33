"""What test_generation runs on ranks; no slow imports here, since every rank makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ssm_dist import LLM, SamplingParams
from ssm_dist.kernels import backend

Backend = Literal["reference", "triton"]
BACKENDS: list[Backend] = ["reference", "triton"]
PROMPTS = ["def f(x):", "a", "import os, sys; print(1)"]
GREEDY = SamplingParams(max_new_tokens=64, ignore_eos=True)

Answers = tuple[list[list[int]], list[float]]
"""The token ids after every prompt, and the log-probabilities of the last prompt's tokens."""


def answers(folders: dict[str, Path]) -> dict[tuple[str, Backend], Answers]:
    """Those of every model under every backend, from the ranks that run this alike."""
    return {(name, chosen): answer(folders[name], chosen) for name in folders for chosen in BACKENDS}


def answer(folder: Path, chosen: Backend) -> Answers:
    with backend.using(chosen, "cuda"):  # and the process's own backend again afterwards
        llm = LLM.from_pretrained(
            folder, kernels={"backend": chosen}, cache={"max_sequences": 2}, prefill={"chunk_tokens": 8}
        )
        assert llm.loaded.device.type == "cuda"
        return [c.token_ids for c in llm.generate(PROMPTS, GREEDY)], llm.score([PROMPTS[2]])[0].log_probs
