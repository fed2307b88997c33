"""Random weights: the same whatever the degree, and of a scale that keeps a model sane."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ssm_dist.checkpoint import random_parameters
from ssm_dist.checkpoint.random_weights import _hash, _normal
from ssm_dist.parallel import apply_plan
from ssm_dist.registry import preset
from tests.checkpoint.ours import our_logits, tensor_parallel
from tests.ranks import run_on_ranks

PRESETS = ("mamba-tiny", "falcon-mamba-tiny", "zamba-tiny")


def meta_model(name: str) -> nn.Module:
    spec, config = preset(name)
    with torch.device("meta"):
        return spec.build(config)


def whole_parameters(name: str, seed: int) -> dict[str, Tensor]:
    """Fill a preset on this many ranks, and gather every parameter."""
    model, tp = meta_model(name), tensor_parallel()
    apply_plan(model, tp, preset(name)[0].plan)
    random_parameters(model, device="cpu", dtype=torch.bfloat16, seed=seed)
    return {path: parameter.full_tensor() for path, parameter in model.named_parameters()}


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("name", PRESETS)
def test_ranks_fill_in_the_same_model_as_one_process(name: str, degree: int) -> None:
    model = meta_model(name)
    random_parameters(model, device="cpu", dtype=torch.bfloat16, seed=3)
    alone = dict(model.named_parameters())
    for parameters in run_on_ranks(degree, whole_parameters, name, 3):
        assert parameters.keys() == alone.keys()
        assert all(torch.equal(parameters[path], alone[path]) for path in alone)


@pytest.mark.parametrize("name", PRESETS)
def test_logits_are_of_unit_scale(name: str) -> None:
    model = meta_model(name)
    random_parameters(model, device="cpu", dtype=torch.float32)
    logits = our_logits(model, torch.arange(50))
    assert 0.05 < logits.std() < 5
    assert logits.argmax(1).unique().numel() > 10


def test_seeds_and_paths_give_different_weights() -> None:
    weights = []
    for seed in (0, 1):
        model = meta_model("mamba-tiny")
        random_parameters(model, device="cpu", dtype=torch.float32, seed=seed)
        weights += [layer.mixer.in_proj.weight for layer in model.layers]
    for i, first in enumerate(weights):
        for second in weights[:i]:
            assert torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].abs() < 0.05


def test_the_recurrence_starts_as_in_mamba() -> None:
    model = meta_model("mamba-tiny")
    random_parameters(model, device="cpu", dtype=torch.bfloat16)
    mixer = model.layers[1].mixer
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
    dt = nn.functional.softplus(mixer.dt_proj.bias)
    assert 0.9e-3 < dt.min() < 2e-3
    assert 5e-2 < dt.max() < 1.1e-1
    assert mixer.D.eq(1).all()
    assert model.layers[1].norm.weight.eq(1).all()


def test_the_numbers_are_near_normal_and_uncorrelated() -> None:
    numbers = _normal(_hash(12345, torch.arange(1 << 20)), 1.0).double()
    assert abs(numbers.mean()) < 5e-3
    assert abs(numbers.std() - 1) < 5e-3
    within = (numbers.abs() < 1).double().mean()
    assert abs(within - math.erf(1 / math.sqrt(2))) < 0.02
    for lag in (1, 2, 64, 4096):
        assert abs((numbers[lag:] * numbers[:-lag]).mean()) < 5e-3
