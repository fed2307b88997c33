"""Weight maps: which tensors of a Hugging Face checkpoint our parameters are, as data.

The names are those of the transformers classes. Where a second spelling of a released checkpoint is known, it
stands beside the first: the original state-spaces code says `embedding` where transformers says `embeddings`.
A checkpoint of the bare model (`MambaModel`, without a head) has no prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ssm_dist.checkpoint.layouts import (
    Blocks,
    ConvWeight,
    Headwise,
    HeadwiseTransposed,
    Identity,
    Layout,
    PackedInterleaved,
    PaddedRows,
    Transposed,
)
from ssm_dist.models.language_model import LanguageModelConfig
from ssm_dist.models.zamba import ZambaConfig

FLOAT32 = ("mixer.A_log", "mixer.D", "mixer.dt_proj.bias")
"""Endings of the parameters that stay float32 whatever the model's dtype: they enter exp and softplus."""


def parameter_dtype(path: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter of a model whose dtype is `dtype`."""
    return torch.float32 if path.endswith(FLOAT32) else dtype


@dataclass(frozen=True)
class Entry:
    """Where one parameter is stored: under any of the names, and if under several, in copies."""

    names: tuple[str, ...]
    layout: Layout = field(default_factory=Identity)
    written: int = 1
    """How many of the names, from the first on, a saved checkpoint has."""


@dataclass(frozen=True)
class WeightMap:
    """All parameters of a model and their places in a checkpoint.

    A parameter that the model lacks (a bias it was built without) needs no tensor.
    """

    prefix: str
    """What the names begin with, unless the checkpoint is one of the bare model."""
    entries: Mapping[str, Entry]
    """By our parameter's path."""


Table = Mapping[str, tuple[str, Layout]]

_MIXER: Table = {
    "mixer.in_proj.weight": ("mixer.in_proj.weight", Blocks(2)),
    "mixer.in_proj.bias": ("mixer.in_proj.bias", Blocks(2)),
    "mixer.conv.weight": ("mixer.conv1d.weight", ConvWeight()),
    "mixer.conv.bias": ("mixer.conv1d.bias", Identity()),
    "mixer.x_proj.weight": ("mixer.x_proj.weight", Transposed()),
    "mixer.dt_proj.weight": ("mixer.dt_proj.weight", Identity()),
    "mixer.dt_proj.bias": ("mixer.dt_proj.bias", Identity()),
    "mixer.A_log": ("mixer.A_log", Identity()),
    "mixer.D": ("mixer.D", Identity()),
    "mixer.out_proj.weight": ("mixer.out_proj.weight", Identity()),
    "mixer.out_proj.bias": ("mixer.out_proj.bias", Identity()),
    "norm.weight": ("norm.weight", Identity()),
}
"""One layer of Mamba and Falcon-Mamba: ours below `layers.{i}.`, theirs below `backbone.layers.{i}.`."""


def _zamba_shared(heads: int) -> Table:
    """The shared block, with its attention heads: theirs below `model.layers.{i}.shared_transf.`."""
    return {
        "shared.input_norm.weight": ("input_layernorm.weight", Identity()),
        "shared.attention.q_proj.weight": ("self_attn.q_proj.weight", Blocks(heads)),
        "shared.attention.k_proj.weight": ("self_attn.k_proj.weight", Blocks(heads)),
        "shared.attention.v_proj.weight": ("self_attn.v_proj.weight", Blocks(heads)),
        "shared.attention.o_proj.weight": ("self_attn.o_proj.weight", Blocks(heads, at=1)),
        "shared.ff_norm.weight": ("pre_ff_layernorm.weight", Identity()),
        "shared.mlp.gate_proj.weight": ("feed_forward.gate_proj.weight", Identity()),
        "shared.mlp.up_proj.weight": ("feed_forward.up_proj.weight", Identity()),
        "shared.mlp.down_proj.weight": ("feed_forward.down_proj.weight", Identity()),
    }


def _zamba_mixer(heads: int) -> Table:
    """One layer: theirs below `model.layers.{i}.`, on hybrid ones `model.layers.{i}.mamba_decoder.`."""
    return {
        "mixer.in_proj.weight": ("mamba.in_proj.weight", PackedInterleaved()),
        "mixer.in_proj.bias": ("mamba.in_proj.bias", PackedInterleaved()),
        "mixer.conv.weight": ("mamba.conv1d.weight", ConvWeight()),
        "mixer.conv.bias": ("mamba.conv1d.bias", Identity()),
        "mixer.x_proj.weight": ("mamba.x_proj_weight", HeadwiseTransposed(heads)),
        "mixer.dt_proj.weight": ("mamba.dt_proj_weight", Headwise(heads)),
        "mixer.dt_proj.bias": ("mamba.dt_proj_bias", Headwise(heads)),
        "mixer.A_log": ("mamba.A_log", Headwise(heads)),
        "mixer.D": ("mamba.D", Headwise(heads)),
        "mixer.out_proj.weight": ("mamba.out_proj.weight", Identity()),
        "mixer.out_proj.bias": ("mamba.out_proj.bias", Identity()),
        "norm.weight": ("input_layernorm.weight", Identity()),
    }


def mamba_weights(config: LanguageModelConfig) -> WeightMap:
    """Mamba and Falcon-Mamba: transformers' names and the original state-spaces ones."""
    entries = _outer(
        config, ("backbone.embeddings.weight", "backbone.embedding.weight"), "backbone.norm_f.weight"
    )
    for i in range(config.n_layers):
        entries |= _entries(_MIXER, f"layers.{i}.", [f"backbone.layers.{i}."])
    return WeightMap("backbone.", entries)


falcon_mamba_weights = mamba_weights


def zamba_weights(config: ZambaConfig) -> WeightMap:
    """Zamba v1: the shared block is stored under one hybrid layer, or under all of them in copies.

    transformers reads and writes copies where the head is not tied: it then ties nothing at all.
    """
    mixer, hybrid = _zamba_mixer(config.heads), config.hybrid_layers
    entries = _outer(config, ("model.embed_tokens.weight",), "model.final_layernorm.weight")
    for i in range(config.n_layers):
        below = f"model.layers.{i}.mamba_decoder." if i in hybrid else f"model.layers.{i}."
        entries |= _entries(mixer, f"layers.{i}.", [below])
    entries |= {f"layers.{i}.linear.weight": Entry((f"model.layers.{i}.linear.weight",)) for i in hybrid}
    shared, sites = (
        _zamba_shared(config.attention_heads),
        [f"model.layers.{i}.shared_transf." for i in hybrid],
    )
    entries |= _entries(shared, "", sites, written=1 if config.tied_head else len(sites))
    return WeightMap("model.", entries)


def _outer(config: LanguageModelConfig, embedding: tuple[str, ...], final_norm: str) -> dict[str, Entry]:
    """What is not in a layer. A tied head may be stored besides the embedding, or in its place."""
    rows, head = PaddedRows(config.vocab_size), "lm_head.weight"
    entries = {"final_norm.weight": Entry((final_norm,))}
    if config.tied_head:
        return entries | {"embedding.weight": Entry((*embedding, head), rows)}
    return entries | {"embedding.weight": Entry(embedding, rows), "head.weight": Entry((head,), rows)}


def _entries(table: Table, ours: str, theirs: list[str], written: int = 1) -> dict[str, Entry]:
    """A table's rows below `ours`, each stored below any of `theirs`."""
    return {
        ours + path: Entry(tuple(below + name for below in theirs), layout, written)
        for path, (name, layout) in table.items()
    }
