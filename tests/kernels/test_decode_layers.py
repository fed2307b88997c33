"""All layers as one operator: what of it needs no GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_dist.checkpoint.random_weights import random_parameters
from ssm_dist.config import KernelsConfig
from ssm_dist.fused_layers import fuse_layers
from ssm_dist.kernels import decode_layers
from ssm_dist.kernels.decode_layers import ARENA_BYTES, CHANNELS, kernel_sizes, programs_of, reason_against
from ssm_dist.models.batch import MixerState, ModelState, RaggedBatch
from ssm_dist.models.mamba import Mamba, MambaConfig
from ssm_dist.registry import preset

PRESETS = ["mamba-130m", "mamba-370m", "mamba-790m", "mamba-1.4b", "mamba-2.8b", "falcon-mamba-7b"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("name", PRESETS)
def test_what_the_kernel_relies_on(name: str, degree: int) -> None:
    sizes = preset(name)[1]
    channels = sizes.d_inner // degree
    if channels % 256:
        pytest.skip("layer by layer")
    programs = programs_of(sizes.d_model, 132)
    found = kernel_sizes(sizes.d_model, channels, sizes.dt_rank, 16, sizes.n_layers, programs, degree)
    outputs = math.ceil(sizes.d_model / programs)
    assert programs <= 132
    assert (programs - 1) * outputs < sizes.d_model <= programs * outputs, "a program without outputs"
    assert math.ceil(channels / programs) <= CHANNELS
    assert sizes.d_model % (256 * found["CHUNKS"]) == channels % (256 * found["CHUNKS"]) == 0
    assert 1 < found["AHEAD"] < found["SLOTS"]
    ring = found["SLOTS"] * (8 * (found["CHUNKS"] * 512 + 64) + 16)
    assert ring > 130_000, "too little to stream while the programs wait for each other"
    assert ring + 2 * max(sizes.d_model, channels) + 8192 <= ARENA_BYTES


@pytest.mark.parametrize("biased", [False, True])
def test_a_cpu_goes_layer_by_layer(biased: bool) -> None:
    model = _model(use_bias=biased)
    fuse_layers(model, None, KernelsConfig(), "triton", CPU)
    assert model.stack is None
    weights = model.layers[0].weights()  # type: ignore[operator]
    assert (weights is None) == biased
    if weights is not None:
        assert [t.is_contiguous() for t in weights.all()] == [True] * 4 + [False] + [True] * 5
        assert "Hopper" in str(reason_against(weights, CPU))


class _ByLayers:
    """A stack of layers that go through the model's own code."""

    name = "by layers"

    def __init__(self, model: Mamba) -> None:
        self.model, self.steps = model, 0

    def step(self, *given: Any) -> Tensor:
        return decode_layers.decode_layers(*given, self.name)  # type: ignore[no-any-return]

    def launch(self, hidden: Tensor, slots: Tensor, conv: list[Tensor], ssm: list[Tensor]) -> Tensor:
        self.steps += 1
        state = ModelState([MixerState(c, s) for c, s in zip(conv, ssm, strict=True)])
        batch, branch, residual = _batch(0, slots), None, hidden.float()
        for layer, layer_state in zip(self.model.layers, state.mixers, strict=True):
            branch, residual = layer(branch, residual, batch, layer_state)
        return self.model.final_norm(branch, residual)[0]  # type: ignore[no-any-return]


@pytest.fixture
def stacked() -> Iterator[tuple[Mamba, _ByLayers]]:
    """A model, and a stack for it that is known by its name."""
    model = _model()
    stack = _ByLayers(model)
    decode_layers._stacks[stack.name] = stack  # type: ignore[assignment]
    yield model, stack
    del decode_layers._stacks[stack.name]


@pytest.mark.parametrize("compiled", [False, True])
def test_steps_of_one_sequence_are_the_operators_and_others_are_not(
    compiled: bool, stacked: tuple[Mamba, _ByLayers]
) -> None:
    model, stack = stacked
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    for slots in ([2], [0, 1], [2]):
        states = [_states(model), _states(model)]
        batch = _batch(7, torch.tensor(slots, dtype=torch.int32))
        model.stack = None
        expected = model(batch, states[0])
        model.stack, before = stack, stack.steps  # type: ignore[assignment]
        assert torch.equal(run(batch, states[1]), expected)
        assert stack.steps - before == (len(slots) == 1)
        for own, other in zip(states[1].mixers, states[0].mixers, strict=True):
            assert torch.equal(own.conv, other.conv)
            assert torch.equal(own.ssm, other.ssm)


def _model(**sizes: Any) -> Mamba:
    config = MambaConfig(vocab_size=40, d_model=32, d_inner=64, dt_rank=8, n_layers=3, **sizes)
    with torch.device("meta"):
        model = Mamba(config)
    random_parameters(model, device=CPU, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def _states(model: Mamba) -> ModelState:
    shapes, draw = model.state_shapes(), torch.Generator().manual_seed(1)
    conv = torch.randn(shapes.layers, 3, *shapes.conv, generator=draw)
    ssm = torch.randn(shapes.layers, 3, *shapes.ssm, generator=draw)
    return ModelState([MixerState(c, s) for c, s in zip(conv, ssm, strict=True)])


def _batch(token: int, slots: Tensor) -> RaggedBatch:
    each = torch.arange(len(slots))
    return RaggedBatch(
        each + token, torch.arange(len(slots) + 1, dtype=torch.int32), slots, each * 0, decode=True
    )
