"""Mamba (arXiv 2312.00752): embedding, layers of norm and mixer, norm, head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from ssm_dist.errors import UserError
from ssm_dist.models.batch import MixerState, ModelState, RaggedBatch, StateShapes
from ssm_dist.models.config_json import ConfigJson
from ssm_dist.models.language_model import LanguageModel, LanguageModelConfig
from ssm_dist.models.layers import AddRMSNorm
from ssm_dist.models.mixer import MambaMixer


@dataclass(frozen=True, kw_only=True)
class MambaConfig(LanguageModelConfig):
    """Sizes of a Mamba model."""

    @classmethod
    def from_huggingface(cls, raw: dict[str, Any]) -> Self:
        """From a parsed config.json, in transformers' spelling or the original one of state-spaces."""
        values = ConfigJson(raw)
        if "d_model" in values and "hidden_size" not in values:
            return cls(**_original_fields(values))
        return cls(**cls._fields(values))

    @classmethod
    def _fields(cls, values: ConfigJson) -> dict[str, Any]:
        values.require("hidden_act", "silu")
        d_model = values.size("hidden_size")
        older = "n_layer" in values and "num_hidden_layers" not in values
        return {
            "vocab_size": values.size("vocab_size"),
            "d_model": d_model,
            "n_layers": values.size("n_layer" if older else "num_hidden_layers", 32),
            # some Falcon-Mamba configurations carry a wrong `expand` beside the right intermediate_size
            "d_inner": values.size("intermediate_size")
            if "intermediate_size" in values
            else values.multiple("expand", d_model, 2),
            "dt_rank": values.size_or_auto("time_step_rank", math.ceil(d_model / 16)),
            "d_state": values.size("state_size", 16),
            "conv_width": values.size("conv_kernel", 4),
            "norm_eps": values.epsilon("layer_norm_epsilon", 1e-5),
            "tied_head": values.switch("tie_word_embeddings", True),
            "use_bias": values.switch("use_bias", False),
            "use_conv_bias": values.switch("use_conv_bias", True),
        }

    def to_huggingface(self) -> dict[str, Any]:
        """The fields of transformers' config.json for this model."""
        return {
            "model_type": "mamba",
            "architectures": ["MambaForCausalLM"],
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            "intermediate_size": self.d_inner,
            "expand": expansion(self.d_inner, self.d_model),
            "time_step_rank": self.dt_rank,
            "state_size": self.d_state,
            "conv_kernel": self.conv_width,
            "layer_norm_epsilon": self.norm_eps,
            "tie_word_embeddings": self.tied_head,
            "use_bias": self.use_bias,
            "use_conv_bias": self.use_conv_bias,
            "hidden_act": "silu",
            "residual_in_fp32": True,
        }


def _original_fields(values: ConfigJson) -> dict[str, Any]:
    """Fields of a state-spaces config.json, whose embedding rows are padded to a multiple."""
    ssm = values.section("ssm_cfg")
    if ssm.text("layer", "Mamba1") != "Mamba1" or values.get("attn_layer_idx"):
        raise UserError(
            "this config.json describes a Mamba-2 or hybrid model; only Mamba-1 is supported here"
        )
    multiple, d_model = values.size("pad_vocab_size_multiple", 8), values.size("d_model")
    return {
        "vocab_size": -(-values.size("vocab_size") // multiple) * multiple,
        "d_model": d_model,
        "n_layers": values.size("n_layer"),
        "d_inner": ssm.multiple("expand", d_model, 2),
        "dt_rank": ssm.size_or_auto("dt_rank", math.ceil(d_model / 16)),
        "d_state": ssm.size("d_state", 16),
        "conv_width": ssm.size("d_conv", 4),
        "tied_head": values.switch("tie_embeddings", True),
    }


def expansion(d_inner: int, d_model: int) -> int:
    """transformers' `expand`. Raises `UserError` for sizes that its integer cannot express."""
    if d_inner % d_model:
        raise UserError(
            f"transformers has no configuration for d_inner = {d_inner} with d_model = {d_model}: "
            "its d_inner is a whole multiple of d_model"
        )
    return d_inner // d_model


class MambaLayer(nn.Module):
    """One norm and one mixer on the residual stream."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.norm = AddRMSNorm(config.d_model, config.norm_eps)
        self.mixer = MambaMixer(config)

    def forward(
        self, branch: Tensor | None, residual: Tensor, batch: RaggedBatch, state: MixerState
    ) -> tuple[Tensor, Tensor]:
        """Takes and returns (branch not yet added, residual stream before it), each (T, d_model)."""
        hidden, residual = self.norm(branch, residual)
        return self.mixer(hidden, batch, state), residual


class Mamba(LanguageModel):
    """The language model."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(MambaLayer(config) for _ in range(config.n_layers))

    def forward(self, batch: RaggedBatch, state: ModelState) -> Tensor:
        """See `LanguageModel`."""
        if self.goes_by_stacks(batch, state):
            (stack,), (run,) = self.stacks, self.runs()
            return stack.step(self.embedding(batch.tokens), None, batch.slots, *state.part(run))
        branch, residual = None, self.embedding(batch.tokens).float()
        for layer, layer_state in zip(self.layers, state.mixers, strict=True):
            branch, residual = layer(branch, residual, batch, layer_state)
        hidden: Tensor = self.final_norm(branch, residual)[0]
        return hidden

    def runs(self) -> list[range]:
        """See `LanguageModel`."""
        return [range(len(self.layers))]

    def state_shapes(self) -> StateShapes:
        """See `LanguageModel`."""
        layer = self.layers[0]
        assert isinstance(layer, MambaLayer)
        return StateShapes(*layer.mixer.state_shapes(), layers=len(self.layers))
