"""Weight maps: which tensors of a Hugging Face checkpoint our parameters are, as data.

The names are those of the transformers classes. Where a second spelling of a released checkpoint is known, it
stands beside the first: the original state-spaces code says `embedding` where transformers says `embeddings`.
A checkpoint of the bare model (`MambaModel`, without a head) has no prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

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

FLOAT32 = ("mixer.A_log", "mixer.D", "mixer.dt_proj.bias")
"""Endings of the parameters that stay float32 whatever the model's dtype: they enter exp and softplus."""


def parameter_dtype(path: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter of a model whose dtype is `dtype`."""
    return torch.float32 if path.endswith(FLOAT32) else dtype


class MambaSizes(Protocol):
    """What a weight map needs to know of a model's configuration."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def tied_head(self) -> bool: ...


class ZambaSizes(MambaSizes, Protocol):
    """Zamba's besides."""

    @property
    def heads(self) -> int: ...
    @property
    def attention_heads(self) -> int: ...
    @property
    def hybrid_layers(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Entry:
    """Where one parameter is stored: the first name is written, any is read (the first one present)."""

    names: tuple[str, ...]
    layout: Layout = field(default_factory=Identity)


@dataclass(frozen=True)
class WeightMap:
    """All parameters of a model and their places in a checkpoint.

    A parameter that the model lacks (a bias it was built without) needs no tensor.
    """

    prefix: str
    """What the names begin with, unless the checkpoint is one of the bare model."""
    entries: Mapping[str, Entry]
    """By our parameter's path."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Names that a checkpoint may carry without need, and the path whose tensor they repeat."""


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


def mamba_weights(config: MambaSizes) -> WeightMap:
    """Mamba and Falcon-Mamba: transformers' names and the original state-spaces ones."""
    entries = _outer(config, "backbone.embeddings.weight", "backbone.norm_f.weight")
    older = (*entries["embedding.weight"].names, "backbone.embedding.weight")
    entries["embedding.weight"] = Entry(older, entries["embedding.weight"].layout)
    for i in range(config.n_layers):
        entries |= _entries(_MIXER, f"layers.{i}.", [f"backbone.layers.{i}."])
    return WeightMap("backbone.", entries, _tied(config))


falcon_mamba_weights = mamba_weights


def zamba_weights(config: ZambaSizes) -> WeightMap:
    """Zamba v1: the shared block is stored under one hybrid layer, or under all of them in copies.

    Of copies the first is read, as transformers does when it ties them.
    """
    mixer, hybrid = _zamba_mixer(config.heads), config.hybrid_layers
    entries = _outer(config, "model.embed_tokens.weight", "model.final_layernorm.weight")
    for i in range(config.n_layers):
        below = f"model.layers.{i}.mamba_decoder." if i in hybrid else f"model.layers.{i}."
        entries |= _entries(mixer, f"layers.{i}.", [below])
    entries |= {f"layers.{i}.linear.weight": Entry((f"model.layers.{i}.linear.weight",)) for i in hybrid}
    entries |= _entries(
        _zamba_shared(config.attention_heads), "", [f"model.layers.{i}.shared_transf." for i in hybrid]
    )
    return WeightMap("model.", entries, _tied(config))


def _outer(config: MambaSizes, embedding: str, final_norm: str) -> dict[str, Entry]:
    """What is not in a layer: embedding, final norm, and the head where it has weights of its own."""
    rows = PaddedRows(config.vocab_size)
    entries = {"embedding.weight": Entry((embedding,), rows), "final_norm.weight": Entry((final_norm,))}
    return entries if config.tied_head else entries | {"head.weight": Entry(("lm_head.weight",), rows)}


def _tied(config: MambaSizes) -> dict[str, str]:
    return {"lm_head.weight": "embedding.weight"} if config.tied_head else {}


def _entries(table: Table, ours: str, theirs: Iterable[str]) -> dict[str, Entry]:
    """A table's rows below `ours`, each read from below any of `theirs`."""
    return {
        ours + path: Entry(tuple(below + name for below in theirs), layout)
        for path, (name, layout) in table.items()
    }
