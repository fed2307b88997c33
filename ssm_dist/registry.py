"""Which model, plan and weight map belong to a `model_type`, and the presets of real shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ssm_dist.checkpoint.weights import WeightMap, falcon_mamba_weights, mamba_weights, zamba_weights
from ssm_dist.errors import UserError
from ssm_dist.models.falcon_mamba import FalconMamba, FalconMambaConfig
from ssm_dist.models.language_model import LanguageModel, LanguageModelConfig
from ssm_dist.models.mamba import Mamba, MambaConfig
from ssm_dist.models.zamba import Zamba, ZambaConfig
from ssm_dist.parallel.plan import Plan
from ssm_dist.parallel.plans import FALCON_MAMBA_PLAN, MAMBA_PLAN, ZAMBA_PLAN


@dataclass(frozen=True)
class ModelSpec:
    """Everything the program knows of one architecture."""

    config: type[LanguageModelConfig]
    build: Callable[[Any], LanguageModel]
    """Configuration -> module."""
    plan: Plan
    weights: Callable[[Any], WeightMap]
    """Configuration -> where the parameters are in a checkpoint."""


SPECS: dict[str, ModelSpec] = {
    "mamba": ModelSpec(MambaConfig, Mamba, MAMBA_PLAN, mamba_weights),
    "falcon_mamba": ModelSpec(FalconMambaConfig, FalconMamba, FALCON_MAMBA_PLAN, falcon_mamba_weights),
    "zamba": ModelSpec(ZambaConfig, Zamba, ZAMBA_PLAN, zamba_weights),
}


def _mamba(n_layers: int, d_model: int, vocab_size: int = 50280) -> MambaConfig:
    return MambaConfig(
        vocab_size=vocab_size, d_model=d_model, n_layers=n_layers, d_inner=2 * d_model, dt_rank=d_model // 16
    )


def _zamba(n_layers: int, d_model: int, hybrid_layers: tuple[int, ...], attention_heads: int) -> ZambaConfig:
    return ZambaConfig(
        vocab_size=32000, d_model=d_model, n_layers=n_layers, d_inner=2 * d_model, dt_rank=d_model // 16,
        hybrid_layers=hybrid_layers, attention_heads=attention_heads,
        attention_head_dim=2 * d_model // attention_heads,
        d_mlp=4 * d_model,
    )  # fmt: skip


PRESETS: dict[str, tuple[str, LanguageModelConfig]] = {
    "mamba-130m": ("mamba", _mamba(24, 768)),
    "mamba-370m": ("mamba", _mamba(48, 1024)),
    "mamba-790m": ("mamba", _mamba(48, 1536)),
    "mamba-1.4b": ("mamba", _mamba(48, 2048)),
    "mamba-2.8b": ("mamba", _mamba(64, 2560)),
    "falcon-mamba-7b": (
        "falcon_mamba",
        FalconMambaConfig(vocab_size=65024, d_model=4096, n_layers=64, d_inner=8192, dt_rank=256),
    ),
    "zamba-7b": ("zamba", _zamba(76, 3712, (2, *range(7, 76, 6)), attention_heads=16)),
    "mamba-tiny": ("mamba", _mamba(2, 64, vocab_size=500)),
    "falcon-mamba-tiny": (
        "falcon_mamba",
        FalconMambaConfig(vocab_size=500, d_model=64, n_layers=2, d_inner=128, dt_rank=4),
    ),
    "zamba-tiny": ("zamba", _zamba(6, 64, (2, 4), attention_heads=4)),
}


def spec_for(model_type: str) -> ModelSpec:
    """The spec of a `model_type` of config.json; `UserError` when it is not one of ours."""
    if model_type not in SPECS:
        raise UserError(f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(SPECS))}")
    return SPECS[model_type]


def preset(name: str) -> tuple[ModelSpec, LanguageModelConfig]:
    """Spec and configuration of a preset; `UserError` when there is none of that name."""
    if name not in PRESETS:
        raise UserError(f"[model] preset = {name!r} does not exist; presets: {', '.join(PRESETS)}")
    model_type, config = PRESETS[name]
    return spec_for(model_type), config
