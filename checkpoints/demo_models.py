"""The three demo models: transformers' own classes, their dimensions, and how one is saved and checked."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from fast_scan import TORCH, fast_mixers
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconMambaConfig, MambaConfig, ZambaConfig

VOCAB_SIZE = 2048
MOST_BYTES = 4_000_000
"""Of one checkpoint folder."""

SHARED = {"vocab_size": VOCAB_SIZE, "hidden_size": 128, "bos_token_id": 0, "eos_token_id": 0}
# `rescale_prenorm_residual` stays off: with it, transformers divides out_proj again when it loads a model.
CONFIGS: dict[str, Any] = {
    "mamba": lambda size: MambaConfig(**SHARED | {
        "pad_token_id": 0, "num_hidden_layers": 12, "state_size": 16, "expand": 2, "conv_kernel": 4,
        "tie_word_embeddings": True, **size,
    }),
    # With a head of its own, as the released models have.
    "falcon_mamba": lambda size: FalconMambaConfig(**SHARED | {
        "pad_token_id": 0, "num_hidden_layers": 11, "state_size": 16, "expand": 2, "conv_kernel": 4,
        "tie_word_embeddings": False, "mixer_rms_eps": 1e-6, **size,
    }),
    # Hybrid layers 2, 5 and 8. No padding id: the class never trains that token's embedding.
    "zamba": lambda size: ZambaConfig(**SHARED | {
        "pad_token_id": None, "num_hidden_layers": 9, "mamba_d_state": 16, "mamba_expand": 2,
        "mamba_d_conv": 4, "n_mamba_heads": 2, "num_attention_heads": 8, "num_key_value_heads": 8,
        "intermediate_size": 512, "attn_layer_period": 3, "attn_layer_offset": 2, "initializer_range": 0.05,
        "tie_word_embeddings": True, **size,
    }),
}  # fmt: skip
"""Architecture -> its configuration, with other sizes where they are given. As it is, every sharded dimension
divides by 8."""

PROMPTS = (
    'import os\nimport sys\n\n\ndef main():\n    """',
    "class Queue:\n    def __init__(self, maxsize=0):\n",
    "def read_lines(path):\n",
)


def folder_name(name: str, size: dict[str, int]) -> str:
    """Name of an architecture's checkpoint folder."""
    kind = "-".join(map(str, size.values())) or "tiny"
    return f"{name.replace('_', '-')}-{kind}-python"


def build_model(name: str, size: dict[str, int], device: torch.device, seed: int) -> Any:
    """A fresh float32 model of transformers' class for the architecture, with `size` over the demo's."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](size), dtype=torch.float32)
    weights = 2 * sum(x.numel() for x in model.parameters())
    if not size and weights > MOST_BYTES - 200_000:
        raise ValueError(
            f"{name}: {weights} bytes of weights leave no room for the tokenizer in {MOST_BYTES}"
        )
    return model.to(device)


def modeling_of(model: Any) -> ModuleType:
    """The file of transformers that defines the model's class and the functions that its mixers call."""
    return sys.modules[type(model).__module__]


def scans_a_forward(model: Any) -> int:
    """How many times a forward pass calls the scan: once a layer and head."""
    return int(model.config.num_hidden_layers) * int(getattr(model.config, "n_mamba_heads", 1))


def save(model: Any, tokenizer_folder: Path, folder: Path) -> None:
    """Write a float32 model whose values are bfloat16 numbers, as such, with its tokenizer."""
    model.to(torch.bfloat16).save_pretrained(folder)
    model.to(torch.float32)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)


def load_checked(model: Any, folder: Path, rows: torch.Tensor) -> tuple[Any, float]:
    """Load a saved folder by transformers, without our functions, in float32.

    Returns the loaded model, and the largest difference of its logits from those of `model` with our
    functions, on the token ids `rows` (b, L). Raises RuntimeError where that is more than rounding.
    """
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(rows.device).eval()
    with torch.no_grad():
        theirs = loaded(rows, use_cache=False).logits
    with torch.no_grad(), fast_mixers(modeling_of(model), TORCH):
        ours = model.eval()(rows, use_cache=False).logits
    difference = float((ours - theirs).abs().max())
    if not difference < 1e-2:
        raise RuntimeError(f"{folder}: transformers' own logits differ by {difference}")
    return loaded, difference


def samples_of(model: Any, folder: Path, tokens: int) -> list[dict[str, object]]:
    """Continuations of the prompts by transformers' `generate`, greedy and at temperature 0.8, top-p 0.95."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    samples: list[dict[str, object]] = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)], device=model.device)
        for options in (
            {"do_sample": False},
            {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0},
        ):
            torch.manual_seed(0)
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **options)
            samples.append({**options, "prompt": prompt, "text": tokenizer.decode(out[0, ids.shape[1] :])})
    return samples
