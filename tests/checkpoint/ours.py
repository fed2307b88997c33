"""Our models, loaded from folders; what runs on ranks, so without transformers, which is slow to import."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssm_dist.checkpoint import WeightMap, load_parameters, open_checkpoint, save_huggingface
from ssm_dist.models.batch import RaggedBatch
from ssm_dist.parallel import ParameterPlacement, TensorParallel, apply_plan, localise, resolve_plan
from ssm_dist.registry import spec_for
from ssm_dist.state_cache import StateCache


@dataclass(frozen=True)
class Ours:
    """A model of ours, and what saving it takes."""

    model: nn.Module
    placements: list[ParameterPlacement]
    weights: WeightMap
    config: dict[str, Any]
    """For config.json."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def save(self, folder: Path, **options: Any) -> None:
        save_huggingface(self.model, self.placements, self.weights, self.config, folder, **options)


def load_ours(folder: Path, tp: TensorParallel | None = None, dtype: torch.dtype = torch.float32) -> Ours:
    """Our model of a folder, its parameters DTensors on the ranks of `tp`, whole tensors without."""
    checkpoint = open_checkpoint(folder)
    spec = spec_for(checkpoint.config["model_type"])
    degree = 1 if tp is None else tp.degree
    config = spec.config.from_huggingface(checkpoint.config)
    config = dataclasses.replace(config, vocab_padded=-(-config.vocab_size // degree) * degree)
    with torch.device("meta"):
        model = spec.build(config)
    resolved = resolve_plan(model, spec.plan, 1) if tp is None else apply_plan(model, tp, spec.plan)
    weights = spec.weights(config)
    load_parameters(model, checkpoint, weights, device="cpu", dtype=dtype)
    return Ours(model, resolved.parameters, weights, config.to_huggingface())


def tensor_parallel() -> TensorParallel:
    """The group of all running ranks."""
    assert dist.is_initialized()
    return TensorParallel.over_all_ranks("cpu")


@torch.inference_mode()
def our_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits (T, V_padded) of one sequence of tokens (T,), by a localised model."""
    localise(model)
    cache = StateCache(
        model.state_shapes(), max_sequences=1, max_tokens=len(tokens), dtype=torch.float32,
        state_dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    slot = cache.acquire(len(tokens))
    assert slot is not None
    batch = RaggedBatch(
        tokens, torch.tensor([0, len(tokens)], dtype=torch.int32), torch.tensor([slot], dtype=torch.int32),
        torch.arange(len(tokens)), pages=cache.page_table([slot]),
    )  # fmt: skip
    logits: Tensor = model.head(model(batch, cache.state))
    return logits


def whole_parameters(folder: Path) -> dict[str, Tensor]:
    """Load on this many ranks, and gather every parameter."""
    ours = load_ours(folder, tensor_parallel())
    return {path: parameter.full_tensor() for path, parameter in ours.parameters.items()}


def load_and_save(folder: Path, target: Path, localised: bool) -> None:
    """Load on this many ranks, and save again in several files."""
    tp = tensor_parallel()
    ours = load_ours(folder, tp)
    if localised:
        localise(ours.model)
    ours.save(target, mesh=tp.mesh, max_shard_bytes=20_000)
