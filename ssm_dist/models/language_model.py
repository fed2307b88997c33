"""What the language models have in common: embedding, final norm and head around their layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from ssm_dist.kernels.decode_layers import LayerStack
from ssm_dist.models.batch import ModelState, RaggedBatch, StateShapes
from ssm_dist.models.layers import AddRMSNorm, Linear
from ssm_dist.models.mixer import MixerConfig


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(MixerConfig, ABC):
    """Sizes of a model; the mixer's are those of every layer."""

    vocab_size: int
    n_layers: int
    norm_eps: float = 1e-5
    tied_head: bool = True
    vocab_padded: int = 0
    """Rows of the embedding and the head, at least vocab_size; 0 for vocab_size itself."""

    @property
    def vocab_rows(self) -> int:
        """Rows that the embedding and the head hold over all ranks."""
        return self.vocab_padded or self.vocab_size

    @classmethod
    @abstractmethod
    def from_huggingface(cls, raw: dict[str, Any]) -> Self:
        """From a parsed config.json. Raises `UserError` for what is not supported."""

    @abstractmethod
    def to_huggingface(self) -> dict[str, Any]:
        """The fields of transformers' config.json for this model."""


class LanguageModel(nn.Module, ABC):
    """Embedding, layers, norm; `head` maps rows of the output to logits over the padded vocabulary."""

    layers: nn.ModuleList
    """Each with the `norm` before its `mixer`."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_rows, config.d_model)
        self.final_norm = AddRMSNorm(config.d_model, config.norm_eps)
        self.head = Linear(config.d_model, config.vocab_rows, bias=False)
        if config.tied_head:
            self.head.weight = self.embedding.weight
        self.stacks: list[LayerStack] = []
        """One for each of `runs`, where decode steps of a few sequences go by them; else empty."""

    def goes_by_stacks(self, batch: RaggedBatch, state: ModelState) -> bool:
        """Whether a batch is for `stacks`."""
        if len(self.stacks) == 0 or state.stacked is None or not batch.decode:
            return False
        return len(batch.tokens) <= self.stacks[0].sequences

    @abstractmethod
    def runs(self) -> list[range]:
        """The layers that follow each other with nothing but a norm between them, run by run."""

    @abstractmethod
    def forward(self, batch: RaggedBatch, state: ModelState) -> Tensor:
        """The final hidden states (T, d_model) of a batch; `state` is advanced in place."""

    @abstractmethod
    def state_shapes(self) -> StateShapes:
        """What this model, or this rank's shard of it, keeps for a sequence."""
