"""Runs the scheduler's steps on the model and samples the next tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ssm_dist.models.batch import RaggedBatch
from ssm_dist.models.language_model import LanguageModel
from ssm_dist.sampling.sampler import Sampled, Sampler
from ssm_dist.scheduler import Chunk, Step
from ssm_dist.state_cache import StateCache


class Engine:
    """One rank's model, state and sampler. Every rank runs the same steps and samples the same tokens."""

    def __init__(self, model: LanguageModel, cache: StateCache, sampler: Sampler, vocab_size: int) -> None:
        """vocab_size: columns of the logits that are tokens; those after it are padding."""
        self.model = model
        self.cache = cache
        self.sampler = sampler
        self._vocab_size = vocab_size
        self._device = next(model.parameters()).device

    @torch.inference_mode()
    def run(self, step: Step) -> tuple[list[Chunk], Sampled | None]:
        """Advance the states by a step; the chunks that reach the end of their prompt or answer get a token.

        Returns those chunks and their samples, rows in the same order; None when there are none.
        """
        hidden = self.hidden(step)
        ends = [c for c in step.chunks if c.start + len(c.tokens) == c.sequence.length]
        if not ends:
            return [], None
        rows = torch.tensor(_last_rows(step.chunks, ends), device=self._device)
        logits = self.model.head(hidden[rows])[:, : self._vocab_size].float()
        slots = torch.tensor([c.sequence.slot for c in ends], device=self._device)
        positions = torch.tensor([c.sequence.length for c in ends], device=self._device)
        return ends, self.sampler.sample(logits, slots, positions)

    @torch.inference_mode()
    def hidden(self, step: Step) -> Tensor:
        """Advance the states by a step and return the final hidden states of its tokens, (T, d_model)."""
        hidden: Tensor = self.model(self._batch(step), self.cache.state)
        return hidden

    def _batch(self, step: Step) -> RaggedBatch:
        """The tensors of a step, on the device."""
        chunks = step.chunks
        slots = [c.sequence.slot for c in chunks]
        offsets: list[int] = [0]
        positions: list[int] = []
        for c in chunks:
            offsets.append(offsets[-1] + len(c.tokens))
            positions += range(c.start, c.start + len(c.tokens))
        tokens = [token for c in chunks for token in c.tokens]
        return RaggedBatch(
            tokens=torch.tensor(tokens, device=self._device),
            seq_offsets=torch.tensor(offsets, dtype=torch.int32, device=self._device),
            slots=torch.tensor(slots, dtype=torch.int32, device=self._device),
            positions=torch.tensor(positions, device=self._device),
            decode=step.decode,
            pages=self.cache.page_table(slots),
        )


def _last_rows(chunks: list[Chunk], ends: list[Chunk]) -> list[int]:
    """Row of the last token of each chunk in `ends`, within the packed batch."""
    rows, end = {}, 0
    for chunk in chunks:
        end += len(chunk.tokens)
        rows[id(chunk)] = end - 1
    return [rows[id(chunk)] for chunk in ends]
