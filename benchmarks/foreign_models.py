"""The models that foreign_plans.py times: other people's classes, random weights, and how each is called."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssm_dist.parallel import TensorParallel, shard_module


@dataclass(frozen=True)
class Subject:
    """A class at the sizes of a release, or at tiny ones."""

    build: Callable[[bool], nn.Module]
    """From whether it is to be tiny; in bfloat16, on the device of the context."""
    prefill: Callable[[nn.Module, Tensor], Any]
    """Read prompts (batch, length); returns the cache."""
    decode: Callable[[nn.Module, Tensor, Any], None]
    """Read one token (batch, 1) of each, and advance the cache."""


def loaded(subject: Subject, tiny: bool, degree: int, device: torch.device) -> nn.Module:
    """The model on the device, or at degrees above 1 this rank's shard of it by the class's ready plan.

    Made on the meta device, and only then allocated, so that no rank ever holds the whole.
    """
    with torch.device("meta"):
        model = subject.build(tiny).eval()
    if degree > 1:
        shard_module(model, TensorParallel.over_all_ranks(device.type))
    model.to_empty(device=device)
    model.tie_weights()  # type: ignore[operator]  # which to_empty undoes
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(0, 0.02)
    return model


def packages() -> str:
    """Which of the packages with CUDA kernels can be imported here; transformers takes its own from them."""

    def there(name: str) -> bool:
        try:
            importlib.import_module(name)
        except ImportError:
            return False
        return True

    return ", ".join(name for name in ("mamba_ssm", "causal_conv1d") if there(name)) or "none"


def _transformers_mamba(tiny: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM, MambaConfig

    width, layers, vocabulary = (36, 3, 97) if tiny else (2560, 64, 50280)
    config = MambaConfig(hidden_size=width, num_hidden_layers=layers, vocab_size=vocabulary)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def _transformers_zamba(tiny: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM, ZambaConfig

    small = {
        "hidden_size": 40, "num_hidden_layers": 8, "vocab_size": 97, "intermediate_size": 52,
        "num_attention_heads": 4, "num_key_value_heads": 4, "mamba_dt_rank": 3,
    }  # fmt: skip
    config = ZambaConfig(**(small if tiny else {}))  # its defaults are zamba-7b-v1
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def _transformers_prefill(model: nn.Module, tokens: Tensor) -> dict[str, Any]:
    """The argument that hands the cache to the next forward; its name differs between classes."""
    output = model(tokens, use_cache=True, logits_to_keep=1)
    name = "cache_params" if getattr(output, "cache_params", None) is not None else "past_key_values"
    return {name: getattr(output, name)}


def _transformers_decode(model: nn.Module, token: Tensor, cache: dict[str, Any]) -> None:
    model(token, use_cache=True, **cache)


def _mamba_ssm(tiny: bool) -> nn.Module:
    from mamba_ssm import MambaLMHeadModel
    from mamba_ssm.models.config_mamba import MambaConfig

    width, layers, vocabulary = (36, 3, 97) if tiny else (2560, 64, 50277)
    config = MambaConfig(d_model=width, n_layer=layers, vocab_size=vocabulary, ssm_cfg={"layer": "Mamba1"})
    model: nn.Module = MambaLMHeadModel(config, dtype=torch.bfloat16)
    return model


def _mamba_ssm_prefill(model: nn.Module, tokens: Tensor) -> Any:
    from mamba_ssm.utils.generation import InferenceParams

    cache = InferenceParams(max_seqlen=2 * tokens.shape[1], max_batch_size=tokens.shape[0])
    _mamba_ssm_decode(model, tokens, cache)
    return cache


def _mamba_ssm_decode(model: nn.Module, tokens: Tensor, cache: Any) -> None:
    model(tokens, inference_params=cache, num_last_tokens=1)
    cache.seqlen_offset += tokens.shape[1]


SUBJECTS = {
    "mamba-2.8b": Subject(_transformers_mamba, _transformers_prefill, _transformers_decode),
    "zamba-7b": Subject(_transformers_zamba, _transformers_prefill, _transformers_decode),
    "mamba-ssm-2.8b": Subject(_mamba_ssm, _mamba_ssm_prefill, _mamba_ssm_decode),
}
"""The first two are transformers' classes; the last is mamba-ssm's MambaLMHeadModel."""
