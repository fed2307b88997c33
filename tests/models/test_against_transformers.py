"""Logits and greedy tokens of transformers' classes with the same weights, at degrees 1, 2 and 4."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests import oracle
from tests.models.running import Run, at_once, load, on_rank
from tests.ranks import run_on_ranks

PROMPTS = [[5], [7, 0], [96, 3, 3], list(range(70, 3, -1))]
"""Shorter than the convolution, just as long, and past one block of the scan."""

GREEDY = 64
each_model = pytest.mark.parametrize("name", oracle.SIZES)
Checkpoint = Callable[[str], Path]


@pytest.mark.parametrize("tokens", PROMPTS, ids=lambda prompt: f"tokens{len(prompt)}")
@each_model
def test_logits_are_those_of_transformers(checkpoint: Checkpoint, name: str, tokens: list[int]) -> None:
    assert_close(at_once(load(checkpoint(name)), tokens), expected_logits(name, tokens), rtol=0, atol=1e-4)


@each_model
def test_64_greedy_tokens_are_those_of_transformers(checkpoint: Checkpoint, name: str) -> None:
    assert Run(load(checkpoint(name))).greedy(PROMPTS, GREEDY) == expected_greedy(name)


@pytest.mark.parametrize("degree", [2, 4])
@each_model
def test_shards_give_the_logits_and_tokens_of_transformers(
    checkpoint: Checkpoint, name: str, degree: int
) -> None:
    """At once and in chunks, and the same bits on every rank, or sampled tokens would part."""
    ranks = run_on_ranks(degree, on_rank, checkpoint(name), PROMPTS, GREEDY, 7)
    expected, tokens = expected_logits(name, PROMPTS[-1]), expected_greedy(name)
    for outputs in ranks:
        assert_close(outputs.at_once, expected, rtol=0, atol=1e-4)
        assert_close(outputs.in_chunks, expected, rtol=0, atol=1e-4)
        assert outputs.greedy == tokens
        assert torch.equal(outputs.at_once, ranks[0].at_once)
        assert torch.equal(outputs.in_chunks, ranks[0].in_chunks)


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "zamba"])
def test_bfloat16_stays_near_float32_and_keeps_the_scans_parameters_in_float32(
    checkpoint: Checkpoint, name: str
) -> None:
    ours, tokens = load(checkpoint(name), torch.bfloat16), PROMPTS[-1]
    logits, expected = at_once(ours, tokens).double(), expected_logits(name, tokens).double()
    assert (logits - expected).norm() < 0.1 * expected.norm()
    wide = {path for path, p in ours.parameters.items() if p.dtype == torch.float32}
    assert wide == {path for path in ours.parameters if path.endswith(("A_log", ".D", "dt_proj.bias"))}


@cache
def expected_greedy(name: str) -> list[list[int]]:
    model = oracle.random_model(name)
    return [oracle.greedy(model, prompt, GREEDY) for prompt in PROMPTS]


def expected_logits(name: str, tokens: list[int]) -> Tensor:
    return oracle.logits(oracle.random_model(name), tokens)
