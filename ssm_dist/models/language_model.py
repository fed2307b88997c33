"""What the language models have in common: embedding, final norm and head around their layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor, nn

from ssm_dist.models.batch import ModelState, RaggedBatch, StateShapes
from ssm_dist.models.layers import AddRMSNorm


class LanguageModelSizes(Protocol):
    """The part of a model's configuration that is used here."""

    @property
    def d_model(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def tied_head(self) -> bool: ...
    @property
    def vocab_rows(self) -> int: ...


class LanguageModel(nn.Module, ABC):
    """Embedding, layers, norm; `head` maps rows of the output to logits over the padded vocabulary."""

    def __init__(self, config: LanguageModelSizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_rows, config.d_model)
        self.final_norm = AddRMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_rows, bias=False)
        if config.tied_head:
            self.head.weight = self.embedding.weight

    @abstractmethod
    def forward(self, batch: RaggedBatch, state: ModelState) -> Tensor:
        """The final hidden states (T, d_model) of a batch; `state` is advanced in place."""

    @abstractmethod
    def state_shapes(self) -> StateShapes:
        """What this model, or this rank's shard of it, keeps for a sequence."""
