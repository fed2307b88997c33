"""The oracle for numerics: transformers' own classes, tiny, of odd sizes, with every parameter random.

transformers initialises norms, D and biases to ones and zeros, which would hide a missing or misplaced one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    ZambaConfig,
    ZambaForCausalLM,
)

_CLASSES: dict[str, tuple[type, type]] = {
    "mamba": (MambaConfig, MambaForCausalLM),
    "falcon_mamba": (FalconMambaConfig, FalconMambaForCausalLM),
    "zamba": (ZambaConfig, ZambaForCausalLM),
}

_ZAMBA = {
    "vocab_size": 97, "hidden_size": 40, "num_hidden_layers": 7, "mamba_dt_rank": 3, "mamba_d_state": 8,
    "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 52,
    "attn_layer_period": 2, "attn_layer_offset": 1,
}  # fmt: skip

SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": (
        "mamba",
        {"vocab_size": 97, "hidden_size": 36, "expand": 3, "num_hidden_layers": 3, "time_step_rank": 3},
    ),
    "mamba-biases": (
        "mamba",
        {
            "vocab_size": 101, "hidden_size": 36, "num_hidden_layers": 2, "time_step_rank": 5,
            "state_size": 8, "conv_kernel": 3, "use_bias": True, "use_conv_bias": False,
            "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3,
        },
    ),
    "falcon_mamba": (
        "falcon_mamba",
        {
            "vocab_size": 101, "hidden_size": 40, "num_hidden_layers": 3, "time_step_rank": 3,
            "tie_word_embeddings": False, "mixer_rms_eps": 1e-2,
        },
    ),
    "zamba": ("zamba", _ZAMBA),
    "zamba-4heads": (
        "zamba",
        _ZAMBA | {"n_mamba_heads": 4, "mamba_proj_bias": True, "tie_word_embeddings": False},
    ),
    "zamba-1head": ("zamba", _ZAMBA | {"n_mamba_heads": 1, "mamba_conv_bias": False, "mamba_expand": 1}),
}  # fmt: skip
"""model_type and transformers' configuration. 4 divides channels and heads, but not the vocabulary."""


def random_model(name: str) -> PreTrainedModel:
    """The float32 model of `SIZES[name]`; the same on every call."""
    model_type, sizes = SIZES[name]
    config_class, model_class = _CLASSES[model_type]
    with torch.random.fork_rng():
        torch.manual_seed(sum(name.encode()))
        model = randomised(model_class(config_class(**sizes)))
        if model_type == "zamba":
            _share_the_transformer(model)
    return model


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """The model with noise on every parameter, drawn from the global generator."""
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.add_(torch.randn_like(parameter) * fan_in**-0.5)
    return model.eval()


def trained_model(folder: Path) -> PreTrainedModel:
    """The model of a checkpoint folder, in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def _share_the_transformer(model: PreTrainedModel) -> None:
    """transformers shares Zamba's block only where the head is tied too; the architecture always does."""
    blocks = [layer.shared_transf for layer in model.model.layers if hasattr(layer, "shared_transf")]
    for block in blocks[1:]:
        block.load_state_dict(blocks[0].state_dict())


@torch.inference_mode()
def logits(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """Logits (len(tokens), V) of one sequence, computed at once."""
    result: Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return result


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: list[int], count: int, cached: bool = True) -> list[int]:
    """The `count` most likely tokens after a prompt, one by one, never stopping early."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, use_cache=cached
    )
    continuation: list[int] = out[0, len(prompt) :].tolist()
    return continuation
