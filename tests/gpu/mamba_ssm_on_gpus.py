"""What test_foreign_mamba_ssm runs on ranks: mamba-ssm's own class, whole or sharded by its ready plan.

mamba_ssm is imported inside: it takes seconds, and is not always there.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from ssm_dist.parallel import TensorParallel, shard_module

# mamba-ssm reads it as it is imported: one form of each kernel, instead of tuning them for minutes.
os.environ["MAMBA_DETERMINISTIC"] = "1"

SIZES: dict[str, Any] = {
    "d_model": 36, "n_layer": 3, "vocab_size": 97, "pad_vocab_size_multiple": 1,
    "ssm_cfg": {"layer": "Mamba1", "expand": 3, "d_state": 8, "dt_rank": 3},
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "fused-norms-tied-head": SIZES,
    "with-mlps": SIZES | {"d_intermediate": 48},
    "layer-norms-own-head-biases": SIZES
    | {"rms_norm": False, "fused_add_norm": False, "residual_in_fp32": False, "tie_embeddings": False}
    | {"ssm_cfg": SIZES["ssm_cfg"] | {"bias": True, "conv_bias": False}},
}
"""Of the released architecture, and of what else its configuration allows."""

PROMPTS = [[96, 3, 3, 50, 7, 8, 1], [5, 5, 20, 96, 0, 61, 2]]
GREEDY = 32

Answers = tuple[torch.Tensor, list[list[int]]]
"""Logits (2, 7, 97) of the prompts, and the prompts with the tokens that `generate` added."""


def build(name: str) -> Any:
    """The float32 model on the CPU with every parameter random, the same on every call."""
    from mamba_ssm import MambaLMHeadModel
    from mamba_ssm.models.config_mamba import MambaConfig

    torch.manual_seed(1)
    model = MambaLMHeadModel(MambaConfig(**MODELS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.add_(torch.randn(parameter.shape) * fan_in**-0.5)
    return model


def placed(name: str, device: str) -> Any:
    """The model on this process's device: whole, or where there are ranks, this one's shard of it."""
    model = build(name)
    if dist.is_initialized():
        shard_module(model, TensorParallel.over_all_ranks(device))
    return model.to(device)


def answers(device: str) -> dict[str, Answers]:
    """Logits and tokens of every model: forward without a cache, and generate with one."""
    found = {}
    tokens = torch.tensor(PROMPTS, device=device)
    for name in MODELS:
        model = placed(name, device)
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            logits = model(tokens).logits
            written = model.generate(tokens, max_length=tokens.shape[1] + GREEDY)
        found[name] = (logits.cpu(), written.tolist())
    return found


def replayed(name: str) -> list[list[int]]:
    """The same tokens by mamba-ssm's decode step in a CUDA graph."""
    model, tokens = placed(name, "cuda"), torch.tensor(PROMPTS, device="cuda")
    written: list[list[int]] = model.generate(tokens, max_length=tokens.shape[1] + GREEDY, cg=True).tolist()
    return written
