"""Other people's models, tiny: transformers' from the oracle, and Jamba; imports transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import JambaConfig, JambaForCausalLM, PreTrainedModel

from tests import oracle

_JAMBA: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "attn_layer_period": 3, "attn_layer_offset": 1,
    "num_experts": 3, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_dt_rank": 3,
    "mamba_d_state": 8,
}  # fmt: skip
# 48: the shard's rows of the experts must be multiples of 16 bytes for torch's grouped GEMM

JAMBAS = {
    "jamba": _JAMBA,
    "jamba-groups": _JAMBA | {"num_key_value_heads": 2, "mamba_proj_bias": True, "mamba_conv_bias": False},
    "jamba-no-attention": _JAMBA | {"attn_layer_period": 9, "attn_layer_offset": 8},
    "jamba-dense": _JAMBA | {"num_experts": 1, "num_hidden_layers": 2},
}


def build(name: str) -> PreTrainedModel:
    """The float32 model with random parameters, the same on every call."""
    if name in oracle.SIZES:
        return oracle.random_model(name)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return oracle.randomised(JambaForCausalLM(JambaConfig(**JAMBAS[name])))
