"""Which sequences the next step works on. The same calls give the same steps on every rank.

Steps alternate: one of prompt chunks, within a budget of tokens, then one token of every running sequence.
So two tokens of a running sequence are never further apart than one chunk's step and one decode step, however
many prompts arrive; and every decode step is a pure one, for the one-token kernels and captured graphs.
A step that mixed both would take the running sequences through the ragged kernels whenever somebody arrives,
slower, and with other rounding than they have alone.
"""

from __future__ import annotations

import functools
from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ssm_dist.prefix_cache import PrefixCache
from ssm_dist.prefix_limits import chunk_grid
from ssm_dist.sampling.params import SamplingParams


@dataclass(eq=False)
class Sequence:
    """A prompt and what has been generated after it."""

    index: int
    """The request that it answers."""
    prompt_ids: list[int]
    params: SamplingParams
    slot: int = -1
    computed: int = 0
    """Tokens of the prompt that the state has absorbed."""
    token_ids: list[int] = field(default_factory=list)
    """Generated, as far as the host has read them."""
    sampled: int = 0
    """Tokens of the answer, those on their way to the host included."""

    @functools.cached_property
    def prompt(self) -> Tensor:
        """`prompt_ids` as int64 in host memory, made when the first step reads some of them."""
        return torch.frombuffer(array("q", self.prompt_ids), dtype=torch.int64)

    @property
    def prefilled(self) -> bool:
        """Whether the state has absorbed the whole prompt."""
        return self.computed == len(self.prompt_ids)

    @property
    def length(self) -> int:
        """Tokens of prompt and answer together; the position of the next token."""
        return len(self.prompt_ids) + self.sampled

    @property
    def most_tokens(self) -> int:
        """Tokens that the state may have to absorb; the last one generated never enters it."""
        return len(self.prompt_ids) + self.params.max_new_tokens - 1


class Chunk(NamedTuple):
    """A run of `length` tokens of one sequence in a step, from place `start` of the whole sequence on.

    In a decode step it is one token, which the device sampled and the host need not know.
    """

    sequence: Sequence
    start: int
    length: int

    @property
    def end(self) -> int:
        """The place after its last token."""
        return self.start + self.length

    @property
    def tokens(self) -> Tensor:
        """(length,) int64 in host memory, of a prompt."""
        return self.sequence.prompt[self.start : self.end]


@dataclass(frozen=True)
class Step:
    """One call of the model: either chunks of prompts, or one token of every running sequence."""

    chunks: list[Chunk]
    decode: bool


class Scheduler:
    """Admits sequences in order of arrival, and alternates between prefill chunks and decode steps."""

    def __init__(self, prefixes: PrefixCache, chunk_tokens: int) -> None:
        """chunk_tokens: prompt tokens in one step at most. Raises `UserError` as `chunk_grid`."""
        self._prefixes = prefixes
        self._chunk_tokens = chunk_tokens
        limits = prefixes.limits
        self._grid = None if limits is None else chunk_grid(limits.interval, chunk_tokens)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._decoded_last = True

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; the caller has checked that it fits an empty cache."""
        self._waiting.append(sequence)

    def next_step(self) -> tuple[list[Sequence], Step | None]:
        """The sequences newly admitted to a slot, and the next step.

        None when nothing is left to do but reading the last tokens of sequences that end by their length.
        """
        admitted = self._admit()
        prefilling = [sequence for sequence in self._running if not sequence.prefilled]
        ready = [s for s in self._running if 0 < s.sampled < s.params.max_new_tokens]
        if prefilling and (self._decoded_last or not ready):
            self._decoded_last = False
            return admitted, Step(self._prefill_chunks(prefilling), decode=False)
        self._decoded_last = True
        chunks = [Chunk(s, s.length - 1, 1) for s in ready]
        return admitted, Step(chunks, decode=True) if chunks else None

    def finish(self, sequence: Sequence) -> None:
        """Give back the slot of a sequence that has ended, or drop it from the queue."""
        if sequence in self._running:
            self._running.remove(sequence)
            self._prefixes.cache.release(sequence.slot)
        else:
            self._waiting.remove(sequence)

    def _admit(self) -> list[Sequence]:
        admitted = []
        while self._waiting:
            place = self._prefixes.acquire(self._waiting[0].prompt_ids, self._waiting[0].most_tokens)
            if place is None:
                break
            sequence = self._waiting.popleft()
            sequence.slot, sequence.computed = place
            self._running.append(sequence)
            admitted.append(sequence)
        return admitted

    def _prefill_chunks(self, prefilling: list[Sequence]) -> list[Chunk]:
        """The next tokens of the oldest prompts, up to the chunk's budget.

        With snapshots, a chunk goes up to the next multiple of the grid or not at all.
        """
        chunks, budget = [], self._chunk_tokens
        for sequence in prefilling:
            start, end = sequence.computed, len(sequence.prompt_ids)
            if self._grid is not None:
                end = min(end, start - start % self._grid + self._grid)
            elif end - start > budget:
                end = start + budget
            if end - start > budget:
                break
            chunks.append(Chunk(sequence, start, end - start))
            sequence.computed = end
            budget -= end - start
            if budget == 0:
                break
        return chunks
