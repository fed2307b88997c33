"""What one step works on: a ragged batch of tokens, and the states that it continues."""

from dataclasses import dataclass, field

from torch import Tensor
from typing_extensions import Self


@dataclass(frozen=True)
class RaggedBatch:
    """Tokens of S sequences, packed without padding; every tensor is on the model's device."""

    tokens: Tensor
    """(T,) int64 token ids."""
    seq_offsets: Tensor
    """(S + 1,) int32; sequence s owns tokens[seq_offsets[s] : seq_offsets[s + 1]]."""
    slots: Tensor
    """(S,) int32, the state slot of each sequence; all different."""
    positions: Tensor
    """(T,) int64, the place of each token in its own sequence, counted from the first prompt token."""
    decode: bool = False
    """True when every sequence has exactly one token, so that the one-token kernels apply."""
    pages: Tensor | None = None
    """(S, P) int32 page table of each sequence, for models with attention."""


@dataclass(frozen=True)
class MixerState:
    """The recurrent state of one layer, for all slots."""

    conv: Tensor
    """(slots, conv_width - 1, d_inner): the last inputs of the convolution, oldest first."""
    ssm: Tensor
    """(slots, d_inner, d_state): the state of the scan."""


@dataclass(frozen=True)
class KVPages:
    """Keys and values of one attention call site, each (pages, page_size, heads, head_dim)."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class ModelState:
    """Everything a model carries from one step to the next."""

    mixers: list[MixerState]
    """One a layer."""
    attention: list[KVPages] = field(default_factory=list)
    """One an attention call site; empty for pure state-space models."""
    stacked: MixerState | None = None
    """All layers' recurrent states in one, (layers, slots, ...), of which `mixers` are parts."""

    @classmethod
    def of(cls, stacked: MixerState, attention: list[KVPages]) -> Self:
        """From the stacked states of all layers."""
        mixers = [MixerState(*layer) for layer in zip(stacked.conv, stacked.ssm, strict=True)]
        return cls(mixers, attention, stacked)

    def part(self, layers: range) -> tuple[Tensor, Tensor]:
        """The convolution's states of some layers, and the scan's, stacked."""
        assert self.stacked is not None
        return self.stacked.conv[layers.start : layers.stop], self.stacked.ssm[layers.start : layers.stop]


@dataclass(frozen=True)
class StateShapes:
    """What a model needs of the state cache: shapes of one slot and of one token, on this rank."""

    conv: tuple[int, int]
    """(conv_width - 1, d_inner)."""
    ssm: tuple[int, int]
    """(d_inner, d_state)."""
    layers: int
    attention_sites: int = 0
    kv: tuple[int, int] = (0, 0)
    """(heads, head_dim) of the keys, and of the values, of one token at one site."""
