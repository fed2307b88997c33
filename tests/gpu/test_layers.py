"""All layers in one kernel, for steps of a few sequences: against the definitions and layer by layer."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from tests.gpu.layers_on_gpus import PROMPTS, SIZES, Found, answers, found, replays, without_a_rank
from tests.oracle import logits
from tests.ranks import run_on_ranks

FEW = [name for name in SIZES if name != "zamba"]
GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 1 or torch.cuda.get_device_capability() != (9, 0), reason="needs Hopper GPUs"),
]


def at(degree: int) -> int:
    """The degree, if this host has so many GPUs."""
    if degree > GPUS:
        pytest.skip(f"needs {degree} GPUs")
    return degree


def check(outcome: Found) -> None:
    """As near to the definition in float32 as the layers' own kernels are, step by step and in the end.

    Both round to bfloat16 at the same places, but sum in other orders, so that the distances, a few
    thousandths, differ by chance: by less than a fifth on average, and never twofold.
    """
    assert mean(outcome.fused) < 1.2 * mean(outcome.by_layers)
    assert max(outcome.fused) < 2 * max(outcome.by_layers)
    assert outcome.states[0] < 1.5 * outcome.states[1]
    assert outcome.idle


@pytest.mark.parametrize("name", SIZES)
def test_one_gpu(name: str) -> None:
    check(found(name, 1000 if name == "mamba" else 100))


def test_states_of_sixteen_bits() -> None:
    check(found("mamba", 100, torch.bfloat16))
    check(found("mamba", 100, torch.bfloat16, 8))


@pytest.mark.parametrize("name", FEW)
def test_one_to_eight_sequences_on_one_gpu(name: str) -> None:
    check(found(name, 1000 if name == "mamba" else 100, most=8))


@pytest.mark.parametrize(
    ("degree", "name"), [*((2, name) for name in FEW), *((4, name) for name in FEW if "wide" in name)]
)
def test_one_to_eight_sequences_on_several_gpus(degree: int, name: str) -> None:
    given = name, 100, torch.float32, 8
    first, *others = run_on_ranks(at(degree), found, *given, device="cuda", timeout=200.0)
    check(first)
    for other in others:
        check(other)
        assert torch.equal(other.outputs, first.outputs)


def test_replayed_steps_have_the_bits_of_steps_as_written() -> None:
    assert replays("mamba", 100)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("degree", [2, 4])
def test_several_gpus_and_they_get_the_same_bits(degree: int, name: str) -> None:
    steps = 300 if name == "mamba" else 100
    first, *others = run_on_ranks(at(degree), found, name, steps, device="cuda", timeout=200.0)
    check(first)
    for other in others:
        check(other)
        assert torch.equal(other.outputs, first.outputs)


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_answers_are_those_of_layer_by_layer_captured_or_compiled(degree: int, tmp_path: Path) -> None:
    """Log-probabilities are as near to transformers' in float32 as those of layer by layer are."""
    theirs = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=1024, num_hidden_layers=4))
    theirs.to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = theirs.float()
    apart = {}
    for way in ((True, "capture"), (True, "compile"), (False, "capture")):
        first, *others = run_on_ranks(at(degree), answers, tmp_path, *way, device="cuda", timeout=200.0)
        assert all(other == first for other in others)
        apart[way] = [
            abs(found - float(true))
            for prompt, ids, found_all in zip(PROMPTS * 2, *first, strict=True)
            for found, true in zip(found_all, _log_probs(theirs, prompt, ids), strict=True)
        ]
    by_layers = apart.pop((False, "capture"))
    for errors in apart.values():
        assert mean(errors) < 1.3 * mean(by_layers)
        assert max(errors) < 2 * max(by_layers)


def _log_probs(model: MambaForCausalLM, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """Of each of the tokens that follow a prompt."""
    found = logits(model, prompt + ids)[len(prompt) - 1 : -1].log_softmax(-1)
    return found.gather(1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("degree", [2, 4])
def test_a_rank_that_is_missing_is_named_in_time(degree: int) -> None:
    message, seconds = run_on_ranks(at(degree), without_a_rank, device="cuda", timeout=100.0)[0]
    assert f"decode_layers over shared memory got nothing from rank {degree - 1} for 3 s" in message
    assert seconds < 10.0
