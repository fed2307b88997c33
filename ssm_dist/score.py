"""Log-probabilities of given tokens; what fidelity is measured with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ssm_dist.engine import Engine
from ssm_dist.parallel.mesh import TensorParallel
from ssm_dist.parallel.vocabulary import target_log_probs
from ssm_dist.sampling.params import SamplingParams
from ssm_dist.scheduler import Chunk, Sequence

ROWS = 1024
"""Rows of logits held at a time."""


@dataclass(frozen=True)
class Score:
    """How likely a model finds a text."""

    token_ids: list[int]
    log_probs: list[float]
    """Natural logarithms, one a token from the second on, each given all tokens before it."""

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability; NaN for a single token."""
        return math.exp(-sum(self.log_probs) / len(self.log_probs)) if self.log_probs else math.nan


@torch.inference_mode()
def score_tokens(
    engine: Engine, tp: TensorParallel | None, token_ids: list[int], vocab_size: int, chunk_tokens: int
) -> Score:
    """Score one sequence in chunks of `chunk_tokens`; the vocabulary stays split over the ranks.

    The cache must have a free slot, and room for the sequence. Collective under tensor parallelism.
    """
    sequence = Sequence(0, token_ids, SamplingParams())
    slot = engine.cache.acquire(len(token_ids))
    assert slot is not None, "no slot is free"
    sequence.slot = slot
    log_probs: list[float] = []
    try:
        for start in range(0, len(token_ids) - 1, chunk_tokens):
            chunk = Chunk(sequence, start, min(chunk_tokens, len(token_ids) - 1 - start))
            hidden = engine.hidden([chunk])
            targets = sequence.prompt[start + 1 : chunk.end + 1].to(hidden.device)
            for rows, wanted in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
                # the head's own forward would gather the logits of the whole vocabulary
                logits = F.linear(rows, engine.model.head.weight)
                log_probs += target_log_probs(logits, wanted, vocab_size, tp).tolist()
    finally:
        engine.cache.release(slot)
    return Score(token_ids, log_probs)
