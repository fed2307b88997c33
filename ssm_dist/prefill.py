"""The prefill step: from chunks of prompts to the final hidden states of their tokens.

On a GPU it is captured in CUDA graphs, padded to some numbers of tokens and sequences. With several ranks, a
long one is worked on in two halves, whose sums over ranks hide behind each other's scans (`interleaving`).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ssm_dist.graphs import Graphs, bucket
from ssm_dist.models.batch import RaggedBatch
from ssm_dist.models.language_model import LanguageModel
from ssm_dist.packing import Packer, PrefillNumbers, Shape, split, unpacked
from ssm_dist.parallel.interleaving import Interleaver
from ssm_dist.scheduler import Chunk
from ssm_dist.state_cache import StateCache

PARTS = 8
"""Numbers of tokens of captured steps between two powers of two."""

LEAST_STEP = 64
"""Tokens between two of them at least: fewer take as long, since the weights are read all the same."""

HALVES_FROM = {False: 8192, True: 32768}
"""Tokens of a step that is worked on in halves, by whether sums are quantised (benchmarks/overlap): exact
ones take a sixth to an eighth of a step's time, which halves hide. Quantised ones need more programs beside
a scan, and gain nothing by it in shorter steps."""


class Prefill:
    """One rank's prefill steps."""

    def __init__(
        self, model: LanguageModel, cache: StateCache, packer: Packer, chunk_tokens: int, overlap_tokens: int
    ) -> None:
        """chunk_tokens: of a step at most. overlap_tokens: a step of so many has halves; 0: none has."""
        self.overlap_tokens = overlap_tokens
        self.chunk_tokens = chunk_tokens
        self._model, self._cache, self._packer = model, cache, packer
        self._device = next(model.parameters()).device
        self.interleaver = Interleaver(self._device)
        self._hidden: Tensor | None = None

    def hidden(self, chunks: list[Chunk], graphs: Graphs | None) -> Tensor:
        """Advance the states by chunks; the final hidden states of their tokens, (T, d_model), in order.

        They hold until the next step. graphs: captures steps; None runs them as they are.
        """
        self._cache.zero_taken()
        tokens = sum(c.length for c in chunks)
        parts = self._parts(chunks, tokens, padded=graphs is not None)
        shapes = self._shapes(parts, padded=graphs is not None)
        packed = self._packer.prefill(parts, shapes)
        if graphs is None:
            return _joined(self._run(packed.to(self._device, non_blocking=True), shapes))
        hidden: Tensor = graphs.run(
            ("prefill", *shapes),
            lambda inputs: self._run_into_place(inputs, shapes),
            packed,
            lambda: self._packer.prefill([[] for _ in shapes], shapes),
            lazy=True,
        )
        return hidden[:tokens]  # the first half is not padded

    def _parts(self, chunks: list[Chunk], tokens: int, *, padded: bool) -> list[list[Chunk]]:
        """All chunks, or two halves of them, of which the first needs no padding."""
        half = -(-tokens // 2)
        half = self._bucket(half) if padded else half
        if half < tokens and 0 < self.overlap_tokens <= tokens:
            return [*split(chunks, half)]
        return [chunks]

    def _shapes(self, parts: list[list[Chunk]], *, padded: bool) -> tuple[Shape, ...]:
        """What the parts are padded to, if they are: to as many sequences each, so that shapes come again."""
        shapes = [Shape(sum(c.length for c in part), len(part)) for part in parts]
        if padded:
            sizes = [self._bucket(tokens) for tokens, _ in shapes]
            most = max(n + (size > tokens) for size, (tokens, n) in zip(sizes, shapes, strict=True))
            shapes = [Shape(size, 1 << (most - 1).bit_length()) for size in sizes]
        return tuple(shapes)

    def _bucket(self, tokens: int) -> int:
        return bucket(tokens, max(self.chunk_tokens, tokens), PARTS, LEAST_STEP)

    def _run_into_place(self, packed: Tensor, shapes: tuple[Shape, ...]) -> Tensor:
        """`_run`, its results always in the same memory: each graph would hold its own otherwise."""
        parts = self._run(packed, shapes)
        tokens = sum(shape.tokens for shape in shapes)
        if self._hidden is None or len(self._hidden) < tokens:
            most = max(tokens, self.chunk_tokens, 2 * self._bucket(-(-self.chunk_tokens // 2)))
            self._hidden = parts[0].new_empty((most, *parts[0].shape[1:]))
        return torch.cat(parts, out=self._hidden[:tokens])

    def _run(self, packed: Tensor, shapes: tuple[Shape, ...]) -> list[Tensor]:
        """The final hidden states of each part."""
        batches = map(self._batch, unpacked(packed, shapes))
        calls = [partial(self._model, batch, self._cache.state) for batch in batches]
        return [calls[0]()] if len(calls) == 1 else [*self.interleaver.run(*calls)]

    def _batch(self, part: PrefillNumbers) -> RaggedBatch:
        return RaggedBatch(
            tokens=part.tokens, seq_offsets=part.offsets.int(), slots=part.slots.int(),
            positions=part.positions, pages=self._cache.page_table(part.slots),
        )  # fmt: skip


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
