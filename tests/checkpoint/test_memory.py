"""What is estimated before loading is what is allocated after, and too little memory is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssm_dist import memory
from ssm_dist.checkpoint import random_parameters
from ssm_dist.errors import UserError
from ssm_dist.memory import MemoryNeed, estimate, require_memory
from ssm_dist.models.batch import RaggedBatch
from ssm_dist.parallel import apply_plan, localise, resolve_plan
from ssm_dist.registry import preset
from ssm_dist.state_cache import StateCache
from tests.checkpoint.ours import tensor_parallel
from tests.live_bytes import LiveBytes
from tests.ranks import run_on_ranks

SETTINGS = {"max_sequences": 3, "max_tokens": 1000, "state_dtype": torch.float32}
CPU = torch.device("cpu")


def allocated(name: str, dtype: torch.dtype) -> tuple[int, int, MemoryNeed]:
    """Bytes of the weights and of the state cache on this many ranks, and what was estimated before."""
    spec, config = preset(name)
    with torch.device("meta"):
        model = spec.build(config)
    shapes, tp = model.state_shapes(), tensor_parallel()
    placements = apply_plan(model, tp, spec.plan).parameters
    need = estimate(config, shapes, placements, dtype=dtype, chunk_tokens=8, **SETTINGS)
    random_parameters(model, device="cpu", dtype=dtype)
    localise(model)
    cache = StateCache(model.state_shapes(), dtype=dtype, device=CPU, **SETTINGS)
    return sum(p.nbytes for p in model.parameters()), cache.bytes_allocated, need


@pytest.mark.parametrize("name", ["mamba-tiny", "falcon-mamba-tiny", "zamba-tiny"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_states_of_a_rank_are_exactly_as_estimated(name: str, dtype: torch.dtype) -> None:
    for weights, states, need in run_on_ranks(2, allocated, name, dtype):
        assert weights == need.weights
        assert states == need.states + need.kv_pages
        assert (need.kv_pages > 0) == name.startswith("zamba")


def whole_model(name: str, dtype: torch.dtype, chunk: int) -> tuple[nn.Module, MemoryNeed, StateCache]:
    """A wide, shallow model in one process, its estimate for `chunk` tokens a step, and its state cache."""
    spec, config = preset(name)
    wide = {"d_model": 256, "d_inner": 512, "n_layers": 3, "vocab_size": 2000}
    if name.startswith("zamba"):
        wide |= {"hybrid_layers": (1,), "attention_head_dim": 128, "d_mlp": 1024}
    config = dataclasses.replace(config, **wide)
    with torch.device("meta"):
        model = spec.build(config)
    placements = resolve_plan(model, spec.plan, 1).parameters
    settings = {**SETTINGS, "max_sequences": 32}
    need = estimate(config, model.state_shapes(), placements, dtype=dtype, chunk_tokens=chunk, **settings)
    random_parameters(model, device="cpu", dtype=dtype)
    return model, need, StateCache(model.state_shapes(), dtype=dtype, device=CPU, **settings)


def step(model: nn.Module, cache: StateCache, lengths: list[int]) -> RaggedBatch:
    """A first step of sequences of these lengths."""
    slots = [cache.acquire(length) for length in lengths]
    assert None not in slots
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return RaggedBatch(
        torch.arange(sum(lengths)), offsets, torch.tensor(slots, dtype=torch.int32),
        torch.cat([torch.arange(length) for length in lengths]), decode=max(lengths) == 1,
        pages=cache.page_table(slots),
    )  # fmt: skip


def plain_mask(queries: int, keys: int) -> Tensor:
    """The mask as a tensor: torch's own subclass of Tensor cannot be made while tensors are counted."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


@pytest.mark.parametrize("lengths", [[300, 212], [1] * 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mamba-tiny", "falcon-mamba-tiny", "zamba-tiny"])
@torch.inference_mode()
def test_no_step_holds_more_activations_than_estimated(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, lengths: list[int]
) -> None:
    monkeypatch.setattr("torch.nn.attention.bias.causal_lower_right", plain_mask)
    model, need, cache = whole_model(name, dtype, sum(lengths))
    batch = step(model, cache, lengths)
    with LiveBytes() as count:
        hidden = model(batch, cache.state)
        model.head(hidden[: len(lengths)]).float()
    assert 0.3 * need.activations < count.peak <= need.activations


NEED = MemoryNeed(weights=6 << 30, states=3 << 30, kv_pages=0, activations=1 << 29)


def test_too_little_memory_is_refused_with_the_parts_and_what_to_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "_host_free", lambda: 16 << 30)
    require_memory(NEED, CPU)
    with pytest.raises(UserError) as raised:
        require_memory(NEED, CPU, ranks_here=2)
    message = str(raised.value)
    assert "a rank needs 9.50 GiB, and 8.00 GiB are free" in message
    assert "6.00 GiB   less with a higher [parallel] tensor" in message
    assert "[cache] max_sequences" in message
    assert "max_tokens" not in message  # there are no pages


def test_the_least_over_the_ranks_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_host_free", lambda: 16 << 30)
    with pytest.raises(UserError, match=r"4\.00 GiB are free"):
        require_memory(NEED, CPU, minimum=lambda free: min(free, 4 << 30))


def test_a_container_with_a_limit_has_no_more_than_that(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 300000\ninactive_file 200000\nactive_file 100000\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory._host_free() == 700000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._host_free() > 1 << 27
