"""Zamba v1 (arXiv 2405.16712): Mamba layers, some of which first call one shared transformer block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ssm_dist import kernels
from ssm_dist.models.batch import KVPages, MixerState, ModelState, RaggedBatch, StateShapes
from ssm_dist.models.config_json import ConfigJson
from ssm_dist.models.language_model import LanguageModel, LanguageModelConfig
from ssm_dist.models.layers import AddRMSNorm, Linear
from ssm_dist.models.mamba import expansion
from ssm_dist.models.mixer import MambaMixer


@dataclass(frozen=True, kw_only=True)
class ZambaConfig(LanguageModelConfig):
    """Sizes of a Zamba model."""

    hybrid_layers: tuple[int, ...]
    """Indices of the layers that call the shared block first."""
    attention_heads: int
    attention_head_dim: int
    d_mlp: int
    heads: int = 2
    """Mamba heads."""

    @classmethod
    def from_huggingface(cls, raw: dict[str, Any]) -> Self:
        """From a parsed config.json of transformers."""
        values = ConfigJson(raw)
        values.require("hidden_mamba_act", "silu")
        values.require("hidden_act", "gelu")
        d_model, n_layers = values.size("hidden_size"), values.size("num_hidden_layers")
        d_inner, heads = values.multiple("mamba_expand", d_model, 2), values.size("n_mamba_heads", 2)
        if d_inner % heads:
            values.refuse("n_mamba_heads", f"a divisor of mamba_expand * hidden_size = {d_inner}")
        attention_heads, attention_head_dim = _attention(values, d_model)
        return cls(
            vocab_size=values.size("vocab_size"),
            d_model=d_model,
            n_layers=n_layers,
            d_inner=d_inner,
            dt_rank=values.size_or_auto("mamba_dt_rank", math.ceil(d_model / 16)),
            hybrid_layers=_hybrid_layers(values, n_layers),
            attention_heads=attention_heads,
            attention_head_dim=attention_head_dim,
            d_mlp=values.size("intermediate_size"),
            heads=heads,
            d_state=values.size("mamba_d_state", 16),
            conv_width=values.size("mamba_d_conv", 4),
            norm_eps=values.epsilon("rms_norm_eps", 1e-5),
            tied_head=values.switch("tie_word_embeddings", True),
            use_bias=values.switch("mamba_proj_bias", False),
            use_conv_bias=values.switch("mamba_conv_bias", True),
        )

    def to_huggingface(self) -> dict[str, Any]:
        """The fields of transformers' config.json for this model."""
        hybrid = set(self.hybrid_layers)
        return {
            "model_type": "zamba",
            "architectures": ["ZambaForCausalLM"],
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            "mamba_expand": expansion(self.d_inner, self.d_model),
            "mamba_dt_rank": self.dt_rank,
            "layers_block_type": ["hybrid" if i in hybrid else "mamba" for i in range(self.n_layers)],
            "num_attention_heads": self.attention_heads,
            "num_key_value_heads": self.attention_heads,
            "attention_head_dim": self.attention_head_dim,
            "attention_hidden_size": 2 * self.d_model,
            "intermediate_size": self.d_mlp,
            "n_mamba_heads": self.heads,
            "mamba_d_state": self.d_state,
            "mamba_d_conv": self.conv_width,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied_head,
            "mamba_proj_bias": self.use_bias,
            "mamba_conv_bias": self.use_conv_bias,
            "hidden_act": "gelu",
            "hidden_mamba_act": "silu",
        }


def _attention(values: ConfigJson, d_model: int) -> tuple[int, int]:
    """Attention heads and the size of each; they share 2 * d_model where the size is absent or null."""
    heads = values.size("num_attention_heads", 16)
    if values.get("attention_head_dim") is not None:
        return heads, values.size("attention_head_dim")
    if heads > 2 * d_model:
        values.refuse("num_attention_heads", f"at most 2 * hidden_size = {2 * d_model}")
    return heads, 2 * d_model // heads


def _hybrid_layers(values: ConfigJson, n_layers: int) -> tuple[int, ...]:
    """Layers with attention: listed, or by the period and offset that transformers counts from layer 3."""
    for key in ("layers_block_type", "layer_types"):
        kinds = values.get(key)
        if kinds is not None:
            if not isinstance(kinds, list) or len(kinds) != n_layers or "hybrid" not in kinds:
                values.refuse(key, f'a list of num_hidden_layers = {n_layers} names, some of them "hybrid"')
            return tuple(i for i, kind in enumerate(kinds) if kind == "hybrid")
    if n_layers < 3:
        values.refuse("num_hidden_layers", "at least 3 where layers_block_type does not list the layers")
    period, offset = values.size("attn_layer_period", 6), values.size("attn_layer_offset", 4, least=0)
    return (2, *(i + 3 for i in range(n_layers - 3) if i % period == offset))


class HeadLinear(nn.Module):
    """A projection into attention heads: weight (heads, head_dim, d_in)."""

    def __init__(self, d_in: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, head_dim, d_in))

    def forward(self, hidden: Tensor) -> Tensor:
        """(T, d_in) -> (T, heads held, head_dim)."""
        return kernels.linear(hidden, self.weight.flatten(0, 1)).unflatten(-1, self.weight.shape[:2])


class HeadMerge(nn.Module):
    """The projection out of attention heads: weight (d_out, heads, head_dim); a shard's is a partial sum."""

    def __init__(self, heads: int, head_dim: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, heads, head_dim))

    def forward(self, attended: Tensor) -> Tensor:
        """(T, heads, head_dim) -> (T, d_out)."""
        return kernels.linear(attended.flatten(1), self.weight.flatten(1))


class Attention(nn.Module):
    """Multi-head causal attention without positional embedding; its scale divides by sqrt(head_dim / 2)."""

    def __init__(self, config: ZambaConfig) -> None:
        super().__init__()
        heads, head_dim = config.attention_heads, config.attention_head_dim
        self.scale = (head_dim / 2) ** -0.5
        self.q_proj = HeadLinear(2 * config.d_model, heads, head_dim)
        self.k_proj = HeadLinear(2 * config.d_model, heads, head_dim)
        self.v_proj = HeadLinear(2 * config.d_model, heads, head_dim)
        self.o_proj = HeadMerge(heads, head_dim, config.d_model)

    def forward(self, hidden: Tensor, batch: RaggedBatch, pages: KVPages) -> Tensor:
        """hidden (T, 2 * d_model) -> (T, d_model); the new keys and values are added to `pages`."""
        assert batch.pages is not None, "a model with attention needs a page table"
        query, key, value = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        attended = kernels.paged_attention(
            query, key, value, pages.keys, pages.values,
            batch.seq_offsets, batch.positions, batch.pages, self.scale,
        )  # fmt: skip
        return self.o_proj(attended)


class GatedMLP(nn.Module):
    """down(gelu(gate(x)) * up(x))."""

    def __init__(self, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, d_mlp, bias=False)
        self.up_proj = Linear(d_model, d_mlp, bias=False)
        self.down_proj = Linear(d_mlp, d_model, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(T, d_model) -> (T, d_model)."""
        return self.down_proj(kernels.gated_gelu(self.gate_proj(hidden), self.up_proj(hidden)))


class SharedBlock(nn.Module):
    """The transformer block that all hybrid layers call. There is no residual inside it."""

    def __init__(self, config: ZambaConfig) -> None:
        super().__init__()
        self.input_norm = AddRMSNorm(2 * config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.ff_norm = AddRMSNorm(config.d_model, config.norm_eps)
        self.mlp = GatedMLP(config.d_model, config.d_mlp)

    def forward(
        self, branch: Tensor | None, residual: Tensor, embedded: Tensor, batch: RaggedBatch, pages: KVPages
    ) -> tuple[Tensor, Tensor]:
        """A branch, the residual stream before it and the word embeddings, each (T, d_model).

        Returns the block's output, (T, d_model), and the residual stream with the branch.
        """
        hidden, residual = self.input_norm(branch, residual, embedded)
        hidden, _ = self.ff_norm(self.attention(hidden, batch, pages), None)
        return self.mlp(hidden), residual


class ZambaLayer(nn.Module):
    """One norm and one mixer; a hybrid layer adds the shared block's output to the norm's input only."""

    def __init__(self, config: ZambaConfig, hybrid: bool) -> None:
        super().__init__()
        self.norm = AddRMSNorm(config.d_model, config.norm_eps)
        self.mixer = MambaMixer(config)
        self.linear = Linear(config.d_model, config.d_model, bias=False) if hybrid else None

    def forward(
        self, branch: Tensor | None, residual: Tensor, batch: RaggedBatch, state: MixerState
    ) -> tuple[Tensor, Tensor]:
        """As `MambaLayer`: takes and returns (branch not yet added, residual stream before it)."""
        hidden, residual = self.norm(branch, residual)
        return self.mixer(hidden, batch, state), residual

    def hybrid(
        self, branch: Tensor | None, residual: Tensor, embedded: Tensor, shared: SharedBlock,
        batch: RaggedBatch, state: MixerState, pages: KVPages,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`forward` of a hybrid layer, which needs the word embeddings, too."""
        hidden, residual = self.before_mixer(branch, residual, embedded, shared, batch, pages)
        return self.mixer(hidden, batch, state), residual

    def before_mixer(
        self, branch: Tensor | None, residual: Tensor, embedded: Tensor, shared: SharedBlock,
        batch: RaggedBatch, pages: KVPages,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What goes into the mixer of a hybrid layer, and the residual stream with the branch."""
        assert self.linear is not None
        output, residual = shared(branch, residual, embedded, batch, pages)
        hidden, _ = self.norm(self.linear(output), residual)
        return hidden, residual


class Zamba(LanguageModel):
    """The language model."""

    def __init__(self, config: ZambaConfig) -> None:
        super().__init__(config)
        self.shared = SharedBlock(config)
        hybrid = set(config.hybrid_layers)
        self.layers = nn.ModuleList(ZambaLayer(config, i in hybrid) for i in range(config.n_layers))

    def forward(self, batch: RaggedBatch, state: ModelState) -> Tensor:
        """See `LanguageModel`."""
        embedded = self.embedding(batch.tokens)
        if self.goes_by_stacks(batch, state):
            return self._by_stacks(embedded, batch, state)
        branch, residual, sites = None, embedded.float(), iter(state.attention)
        for layer, mixer in zip(self.layers, state.mixers, strict=True):
            assert isinstance(layer, ZambaLayer)
            if layer.linear is None:
                branch, residual = layer(branch, residual, batch, mixer)
            else:
                site = next(sites)
                branch, residual = layer.hybrid(branch, residual, embedded, self.shared, batch, mixer, site)
        hidden: Tensor = self.final_norm(branch, residual)[0]
        return hidden

    def _by_stacks(self, embedded: Tensor, batch: RaggedBatch, state: ModelState) -> Tensor:
        """`forward` of one token, a run of layers at a time; the last one's stack norms what it returns."""
        stream, sites = embedded.float(), iter(state.attention)
        for run, stack in zip(self.runs(), self.stacks, strict=True):
            first, states = self.layers[run.start], state.part(run)
            assert isinstance(first, ZambaLayer)
            if first.linear is None:
                stream = stack.step(embedded, None, batch.slots, *states)
            else:
                hidden, stream = first.before_mixer(
                    None, stream, embedded, self.shared, batch, next(sites)
                )
                stream = stack.step(hidden, stream, batch.slots, *states)
        return stream

    def runs(self) -> list[range]:
        """See `LanguageModel`."""
        hybrid = [i for i, layer in enumerate(self.layers) if layer.linear is not None]
        starts = sorted({0, *hybrid})
        return [range(a, b) for a, b in zip(starts, [*starts[1:], len(self.layers)], strict=True)]

    def state_shapes(self) -> StateShapes:
        """See `LanguageModel`."""
        layer = self.layers[0]
        assert isinstance(layer, ZambaLayer)
        heads, head_dim, _ = self.shared.attention.k_proj.weight.shape
        sites = sum(isinstance(layer, ZambaLayer) and layer.linear is not None for layer in self.layers)
        return StateShapes(
            *layer.mixer.state_shapes(), layers=len(self.layers), attention_sites=sites, kv=(heads, head_dim)
        )
