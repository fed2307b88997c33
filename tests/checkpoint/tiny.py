"""Tiny models of transformers' own classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    ZambaConfig,
    ZambaForCausalLM,
)

VOCABULARY = 67
MODEL_TYPES = ("mamba", "falcon_mamba", "zamba")


def transformers_model(model_type: str, **changes: Any) -> nn.Module:
    """A random float32 model of odd sizes; every parameter differs from its initial constant."""
    if model_type == "zamba":
        sizes = {
            "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4,
            "intermediate_size": 48, "mamba_dt_rank": 3, "mamba_d_state": 5, "attn_layer_period": 2,
            "attn_layer_offset": 0,
        }  # fmt: skip
        model: nn.Module = ZambaForCausalLM(ZambaConfig(vocab_size=VOCABULARY, **(sizes | changes)))
    else:
        sizes = {"hidden_size": 24, "state_size": 5, "num_hidden_layers": 3, "time_step_rank": 3}
        config, kind = {
            "mamba": (MambaConfig, MambaForCausalLM),
            "falcon_mamba": (FalconMambaConfig, FalconMambaForCausalLM),
        }[model_type]
        model = kind(config(vocab_size=VOCABULARY, **(sizes | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if model_type == "zamba":  # one block also where transformers ties nothing
            for layer in [layer for layer in model.model.layers if hasattr(layer, "shared_transf")]:
                layer.shared_transf.load_state_dict(model.model.layers[2].shared_transf.state_dict())
    return model.eval()
