"""Falcon-Mamba (arXiv 2410.05355): Mamba whose dt, B and C are normalised before use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ssm_dist.models.config_json import ConfigJson
from ssm_dist.models.mamba import Mamba, MambaConfig


@dataclass(frozen=True, kw_only=True)
class FalconMambaConfig(MambaConfig):
    """Sizes of a Falcon-Mamba model."""

    tied_head: bool = False
    mixer_rms_eps: float | None = 1e-6

    @classmethod
    def _fields(cls, values: ConfigJson) -> dict[str, Any]:
        return super()._fields(values) | {"mixer_rms_eps": values.epsilon("mixer_rms_eps", 1e-6)}

    def to_huggingface(self) -> dict[str, Any]:
        """The fields of transformers' config.json for this model."""
        return super().to_huggingface() | {
            "model_type": "falcon_mamba",
            "architectures": ["FalconMambaForCausalLM"],
            "mixer_rms_eps": self.mixer_rms_eps,
        }


class FalconMamba(Mamba):
    """The language model; its configuration alone sets it apart from Mamba."""
