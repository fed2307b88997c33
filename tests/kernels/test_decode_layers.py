"""All layers as one operator: what of it needs no GPU."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_dist import fused_layers
from ssm_dist.checkpoint.random_weights import random_parameters
from ssm_dist.config import KernelsConfig
from ssm_dist.fused_layers import fuse_layers, objection
from ssm_dist.kernels import decode_layers
from ssm_dist.kernels.decode_layers import reason_against
from ssm_dist.kernels.decode_sizes import (
    ARENA_BYTES,
    FEW,
    FEW_ARENA_BYTES,
    few_sizes,
    kernel_sizes,
    programs_of,
)
from ssm_dist.kernels.gluon_layers_form import CHANNELS, few_places, piece_bytes
from ssm_dist.models.batch import KVPages, MixerState, ModelState, RaggedBatch
from ssm_dist.models.language_model import LanguageModel
from ssm_dist.models.mamba import Mamba, MambaConfig
from ssm_dist.models.mixer import MambaMixer
from ssm_dist.models.zamba import Zamba, ZambaConfig
from ssm_dist.parallel.collectives import words
from ssm_dist.registry import preset
from ssm_dist.state_sizes import PAGE_TOKENS

PRESETS = [
    "mamba-130m", "mamba-370m", "mamba-790m", "mamba-1.4b", "mamba-2.8b", "falcon-mamba-7b", "zamba-7b",
]  # fmt: skip
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "degree"),
    [(name, n) for name in PRESETS for n in (1, 2, 3, 4, 6, 8) if preset(name)[1].d_inner % n == 0],
)
def test_what_the_kernel_relies_on(name: str, degree: int) -> None:
    sizes = preset(name)[1]
    channels = sizes.d_inner // degree
    programs = programs_of(sizes.d_model, 132)
    found = kernel_sizes(sizes.d_model, channels, sizes.dt_rank, 16, programs, degree)
    outputs, own = math.ceil(sizes.d_model / programs), math.ceil(channels / programs)
    assert programs <= 132
    assert (programs - 1) * outputs < sizes.d_model <= programs * outputs, "a program without outputs"
    assert own <= CHANNELS
    if sizes.heads > degree:
        heads = sizes.heads // degree
        assert own * (programs // heads) * heads == channels, "a program with channels of two heads"
    for width in (sizes.d_model, channels):
        padded = math.ceil(width / (256 * found["CHUNKS"])) * 256 * found["CHUNKS"]
        assert padded <= math.ceil(width / 1024) * 1024, "x has no zeros there"
    assert 1 < found["AHEAD"] < found["SLOTS"]
    ring = found["SLOTS"] * piece_bytes(found["CHUNKS"])
    assert ring > 130_000, "too little to stream while the programs wait for each other"
    assert ring + 2 * max(sizes.d_model, channels) + 8192 <= ARENA_BYTES


@pytest.mark.parametrize("multiprocessors", [78, 114, 132])
@pytest.mark.parametrize("sequences", FEW)
@pytest.mark.parametrize(
    ("name", "degree"),
    [(n, d) for n in PRESETS if n != "zamba-7b" for d in (1, 2, 4, 8) if preset(n)[1].d_inner % d == 0],
)
def test_what_the_kernel_for_a_few_sequences_relies_on(
    name: str, degree: int, sequences: int, multiprocessors: int
) -> None:
    sizes = preset(name)[1]
    channels, programs = sizes.d_inner // degree, programs_of(sizes.d_model, multiprocessors)
    found = few_sizes(sizes.d_model, channels, sizes.dt_rank, 16, programs, degree, sequences)
    if found is None:
        assert degree > 2 or multiprocessors < 132, "one and two H200s have it"
        return
    wide, outputs = 256 * found["CHUNKS"], sizes.dt_rank + 32
    parts, rows = channels // wide, sizes.d_model // programs
    assert channels % programs == sizes.d_model % programs == 0, "every program has as much"
    assert sizes.d_model % wide == channels % wide == programs % parts == 0, "pieces are whole"
    assert channels // programs % 2 == 0, "x_proj's columns come by twos"
    assert rows <= 32, "a warp has a sequence's columns of the stream"
    assert math.ceil(math.ceil(outputs / programs) * programs / 128) == math.ceil(outputs / 128), "tiles"
    assert 0 <= found["BEFORE_X"] < math.ceil(channels / programs / 8)
    assert 1 < found["AHEAD"] < found["SLOTS"]
    columns = math.ceil(rows * parts / 8) * 8
    places = few_places(programs, sizes.d_model, found["CHUNKS"], outputs, rows * parts, sequences)
    assert list(places) == sorted(places)
    assert all(place % 16 == 0 for place in places)
    numbers = math.ceil(sequences * (sizes.d_model + 2 * programs) / 1024) * 1024
    assert 2 * numbers + 64 * (sequences + 1) <= places[5], "the stream"
    assert places[1] + 8 * sequences * columns * 4 <= places[5], "out_proj's products"
    assert found["SLOTS"] * piece_bytes(found["CHUNKS"]) + places[-1] <= FEW_ARENA_BYTES


@pytest.mark.parametrize("biased", [False, True])
def test_a_cpu_goes_layer_by_layer(biased: bool) -> None:
    model = _model("mamba", use_bias=biased)
    fuse_layers(model, None, KernelsConfig(), "triton", CPU)
    assert model.stacks == []
    mixer = model.layers[0].mixer
    assert isinstance(mixer, MambaMixer)
    weights = mixer.with_norm(model.final_norm.weight)
    assert (weights is None) == biased
    if weights is not None:
        assert [t.is_contiguous() for t in weights.all()] == [True] * 4 + [False] + [True] * 5
        assert "Hopper" in str(reason_against(weights, 1, CPU))


@pytest.mark.parametrize(
    ("name", "asked", "kernels", "said"),
    [
        ("mamba", "none", "triton", "as [kernels] asks"),
        ("mamba", "auto", "reference", "as [kernels] asks"),
        ("zamba", "auto", "triton", "Hopper"),
        ("mamba", "auto", "triton", "Hopper"),
    ],
)
def test_what_keeps_layers_apart(name: str, asked: str, kernels: str, said: str) -> None:
    model = _model(name)
    weights = [layer.mixer.with_norm(layer.norm.weight) for layer in model.layers]  # type: ignore[operator,union-attr]
    section = KernelsConfig.model_validate({"fuse_layers": asked})
    assert said in objection(model, weights, section, kernels, CPU)  # type: ignore[arg-type]
    assert "biases" in objection(model, [None], KernelsConfig(), "triton", CPU)


def test_runs_begin_at_hybrid_layers() -> None:
    assert _model("mamba").runs() == [range(5)]
    assert _model("zamba").runs() == [range(1), range(1, 3), range(3, 5)]
    assert _model("zamba", hybrid_layers=(0, 2)).runs() == [range(2), range(2, 5)]


@pytest.mark.parametrize(
    ("name", "changed", "few"),
    [("mamba", {}, True), ("zamba", {}, False), ("zamba", {"hybrid_layers": (0,)}, False)],
)
def test_a_few_sequences_are_for_models_of_nothing_but_mixers(
    name: str, changed: dict[str, Any], few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(fused_layers, "sizes_of", lambda _layer, _ranks, few: asked.append(few))
    fused_layers._sizes(_model(name, **changed), [None], None)  # type: ignore[list-item]
    assert asked == [few]


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (("", "sizes"), ""),
        (("since there is no room", "{}"), "since there is no room"),
        (("", "other sizes"), "since its ranks' GPUs are not alike"),
    ],
)
def test_ranks_agree(others: tuple[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "group_named", lambda name: SimpleNamespace(name=name, memory="theirs"))
    monkeypatch.setattr(words, "everybodys", lambda _group, mine: [mine, others])
    assert words.agree("tp", "", "sizes") == said
    assert words.agree("tp", "since mine has none", "{}") == "since mine has none"


class _ByLayers:
    """A run of layers that go through the model's own code."""

    def __init__(self, model: LanguageModel, run: range) -> None:
        self.name, self.model, self.run, self.steps = f"{run}", model, run, 0
        self.sequences = 2 if len(model.runs()) == 1 else 1
        self.last = run.stop == len(model.layers)

    def step(self, *given: Any) -> Tensor:
        return decode_layers.decode_layers(*given, self.name)  # type: ignore[no-any-return]

    def result_like(self, hidden: Tensor) -> Tensor:
        return torch.empty_like(hidden)

    def launch(
        self, hidden: Tensor, residual: Tensor | None, slots: Tensor, conv: Tensor, ssm: Tensor
    ) -> Tensor:
        self.steps += 1
        assert conv.is_contiguous()
        assert ssm.is_contiguous()
        assert len(conv) == len(ssm) == len(self.run)
        batch, branch = _batch(0, slots), None
        for i, *states in zip(self.run, conv, ssm, strict=True):
            layer, state = self.model.layers[i], MixerState(*states)
            if branch is None and residual is not None:
                branch = layer.mixer(hidden, batch, state)  # type: ignore[operator]
            else:
                stream = hidden if residual is None else residual
                branch, residual = layer(branch, stream, batch, state)
        assert branch is not None
        assert residual is not None
        return self.model.final_norm(branch, residual)[0] if self.last else branch + residual


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["mamba", "zamba"])
def test_steps_of_a_few_sequences_go_by_the_operator_and_others_do_not(name: str, compiled: bool) -> None:
    if compiled and name == "zamba":
        pytest.skip("the definition of attention reads sizes back")
    model = _model(name)
    stacks = [_ByLayers(model, run) for run in model.runs()]
    decode_layers._stacks.update({stack.name: stack for stack in stacks})  # type: ignore[misc]
    run = torch.compile(model, fullgraph=True, dynamic=True) if compiled else model
    for slots in ([2], [0, 1], [1, 0, 2], [2]):
        states = [_states(model), _states(model)]
        batch = _batch(7, torch.tensor(slots, dtype=torch.int32))
        model.stacks = []
        expected = model(batch, states[0])
        model.stacks, before = stacks, [stack.steps for stack in stacks]  # type: ignore[assignment]
        with torch.inference_mode():
            torch.testing.assert_close(run(batch, states[1]), expected)
        goes = len(slots) <= stacks[0].sequences
        assert [stack.steps - n for stack, n in zip(stacks, before, strict=True)] == [goes] * len(stacks)
        for own, other in zip(states[1].mixers, states[0].mixers, strict=True):
            torch.testing.assert_close(own.conv, other.conv)
            torch.testing.assert_close(own.ssm, other.ssm)
        for mine, others in zip(states[1].attention, states[0].attention, strict=True):
            torch.testing.assert_close(mine.keys, others.keys)


def _model(name: str, **changed: Any) -> LanguageModel:
    sizes = {"vocab_size": 40, "d_model": 32, "d_inner": 64, "dt_rank": 8, "n_layers": 5}
    model: LanguageModel
    with torch.device("meta"):
        if name == "zamba":
            hybrid = {"hybrid_layers": (1, 3), "attention_heads": 2, "attention_head_dim": 32, "d_mlp": 48}
            model = Zamba(ZambaConfig(**{**sizes, **hybrid, **changed}))
        else:
            model = Mamba(MambaConfig(**{**sizes, **changed}))
    random_parameters(model, device=CPU, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def _states(model: LanguageModel) -> ModelState:
    shapes, draw = model.state_shapes(), torch.Generator().manual_seed(1)
    conv = torch.randn(shapes.layers, 3, *shapes.conv, generator=draw)
    ssm = torch.randn(shapes.layers, 3, *shapes.ssm, generator=draw)
    kv = torch.zeros(shapes.attention_sites, 2, 3, PAGE_TOKENS, *shapes.kv)
    return ModelState.of(MixerState(conv, ssm), [KVPages(*site) for site in kv])


def _batch(token: int, slots: Tensor) -> RaggedBatch:
    each = torch.arange(len(slots))
    offsets = torch.arange(len(slots) + 1, dtype=torch.int32)
    return RaggedBatch(each + token, offsets, slots, each * 0, decode=True, pages=slots[:, None])
