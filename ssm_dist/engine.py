"""Runs the scheduler's steps on the model and samples the next tokens.

The last token of every sequence, and its place, stay on the device, where the decode step finds them by slot
and leaves the next ones. So a step can be queued before the host has read the tokens of the one before. On a
GPU, steps are captured in CUDA graphs: the decode step from slots to sampled tokens, padded to some batch
sizes, and the prefill step up to its final hidden states (see `prefill`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ssm_dist import kernels
from ssm_dist.graphs import Graphs, bucket, buckets
from ssm_dist.models.batch import RaggedBatch
from ssm_dist.models.language_model import LanguageModel
from ssm_dist.packing import Packer
from ssm_dist.prefill import Prefill
from ssm_dist.sampling.sampler import Sampled, Sampler
from ssm_dist.scheduler import Chunk, Step
from ssm_dist.state_cache import StateCache

DECODE_PARTS = 2
"""Sizes of captured decode steps between two powers of two."""

COMPILED_STEPS = 64
"""Decode steps that are compiled at most: for each kind of `Sampler.work`, for one sequence and for more."""


@dataclass(frozen=True)
class Pending:
    """A step that the device has been given, and whose samples are on their way to the host."""

    chunks: list[Chunk]
    """Those that get a token, in the order of the samples' rows."""
    sampled: Sampled | None
    """In host memory, once `done` has happened; None when no chunk gets a token."""
    done: torch.cuda.Event | None
    """The end of the step; None where it has ended already."""


class Engine:
    """One rank's model, state and sampler. Every rank runs the same steps and samples the same tokens."""

    def __init__(
        self,
        model: LanguageModel,
        cache: StateCache,
        sampler: Sampler,
        vocab_size: int,
        *,
        graphs: Graphs | None = None,
        compiled: bool = False,
        chunk_tokens: int = 0,
        overlap_tokens: int = 0,
        wait: Callable[[torch.cuda.Event], None] = torch.cuda.Event.synchronize,
    ) -> None:
        """vocab_size: columns of the logits that are tokens; those after it are padding.

        graphs: captures steps; None runs them as they are. compiled: the decode step goes through
        torch.compile as a whole. chunk_tokens: the most tokens of a prefill step. overlap_tokens: a step of
        so many is worked on in two halves, see `interleaving`; 0: none is. wait: returns when an event has
        happened, or raises.
        """
        self.model = model
        self.cache = cache
        self.sampler = sampler
        self.graphs = graphs
        self._vocab_size = vocab_size
        self._wait = wait
        self._device = next(model.parameters()).device
        self._state = cache.state
        self._packer = Packer(cache.padding_slot, pinned=self._device.type == "cuda")
        self.prefill = Prefill(model, cache, self._packer, chunk_tokens, overlap_tokens)
        rows = cache.max_sequences + 1
        self._offsets = torch.arange(rows + 1, dtype=torch.int32, device=self._device)
        self._last_token = torch.zeros(rows, dtype=torch.int64, device=self._device)
        self._last_place = torch.zeros_like(self._last_token)
        self._decode: Callable[[Tensor], Sampled] = self._decode_step
        self._compiled = compiled
        if compiled:
            self._decode = _compiled(self._decode_step)

    @property
    def how(self) -> str:
        """How steps run, for people."""
        decode = "compiled whole, without graph breaks" if self._compiled else "as written"
        if self.graphs is None:
            return f"decode {decode}"
        return f"decode {decode}, {len(self.graphs)} steps captured in CUDA graphs"

    def capture_ahead(self) -> Iterator[int]:
        """Capture the greedy decode step for all batch sizes, the largest first; yields each one done."""
        if self.graphs is not None:
            for size in reversed(buckets(self.cache.max_sequences, DECODE_PARTS)):
                with torch.inference_mode():
                    self._decode_of([self.cache.padding_slot] * size)
                yield size

    @torch.inference_mode()
    def launch(self, step: Step) -> Pending:
        """Advance the states by a step; chunks that reach the end of their prompt or answer get a token."""
        if step.decode:
            ends = step.chunks
            padded = self._decode_of([c.sequence.slot for c in ends])
            sampled: Sampled | None = _each(padded, lambda part: part[: len(ends)])
        else:
            hidden = self.hidden(step.chunks)
            ends = [c for c in step.chunks if c.end == c.sequence.length]
            sampled = self._first_tokens(hidden, step.chunks, ends) if ends else None
        return self._on_its_way(ends, sampled)

    def collect(self, pending: Pending) -> Sampled | None:
        """Wait for the end of a step; its samples, in host memory."""
        if pending.done is not None:
            self._wait(pending.done)
        return pending.sampled

    @torch.inference_mode()
    def hidden(self, chunks: list[Chunk]) -> Tensor:
        """Advance the states by chunks of prompts; the final hidden states of their tokens, (T, d_model).

        They hold until the next step.
        """
        return self.prefill.hidden(chunks, self.graphs)

    def _first_tokens(self, hidden: Tensor, chunks: list[Chunk], ends: list[Chunk]) -> Sampled:
        """Sample what follows the prompts that end in this step."""
        last = _last_rows(chunks, ends)
        numbers = last + [c.sequence.slot for c in ends] + [c.sequence.length for c in ends]
        # from pinned memory: else the host waits for the end of the step, and the device then for the host
        rows, slots, places = self._packer.small(numbers).to(self._device, non_blocking=True).view(3, -1)
        sampled = self.sampler.sample(self._logits(hidden[rows]), slots, places)
        self._remember(slots, sampled.ids, places)
        return sampled

    def _decode_of(self, slots: list[int]) -> Sampled:
        """The decode step of some slots, padded where it is captured."""
        work = self.sampler.work  # planned here: compiled code cannot
        if self.graphs is None:
            return self._decode(torch.tensor(slots, device=self._device))
        size = bucket(len(slots), self.cache.max_sequences, DECODE_PARTS)
        sampled: Sampled = self.graphs.run(
            ("decode", size, work),
            self._decode,
            self._packer.decode(slots, size),
            lambda: self._packer.decode([], size),
        )
        return sampled

    def _decode_step(self, slots: Tensor) -> Sampled:
        """From the last tokens of the slots (S,) int64 to the next ones."""
        tokens, places, next_places, narrow = kernels.load_last(self._last_token, self._last_place, slots)
        batch = RaggedBatch(
            tokens=tokens, seq_offsets=self._offsets[: len(slots) + 1], slots=narrow, positions=places,
            decode=True, pages=self.cache.page_table(slots),
        )  # fmt: skip
        hidden = self.model(batch, self._state)
        sampled = self.sampler.sample(self._logits(hidden), slots, next_places)
        self._remember(slots, sampled.ids, next_places)
        return sampled

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.head(hidden)
        return logits[:, : self._vocab_size]

    def _remember(self, slots: Tensor, ids: Tensor, places: Tensor) -> None:
        # nobody's place stays at the start of nobody's page
        nobody = self.cache.padding_slot
        kernels.store_last(self._last_token, self._last_place, slots, ids, places, nobody)

    def _on_its_way(self, ends: list[Chunk], sampled: Sampled | None) -> Pending:
        if self._device.type != "cuda":
            return Pending(ends, sampled, None)
        host = None if sampled is None else _each(sampled, _to_host)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._device))
        return Pending(ends, host, done)


def _compiled(step: Callable[[Tensor], Sampled]) -> Callable[[Tensor], Sampled]:
    """The step as one graph a kind of work, however many kinds; torch would stop, with an error, at eight.

    Nothing is chosen by timing that changes the order of sums: ranks that choose apart would differ in bits.
    """
    compiled = torch.compile(step, fullgraph=True, dynamic=True, options={"deterministic": True})

    def run(slots: Tensor) -> Sampled:
        with torch._dynamo.config.patch(recompile_limit=COMPILED_STEPS):  # by thread, so here
            return compiled(slots)

    return run


def _each(sampled: Sampled, change: Callable[[Tensor], Tensor]) -> Sampled:
    return Sampled(*(None if part is None else change(part) for part in sampled))  # type: ignore[arg-type]


def _to_host(part: Tensor) -> Tensor:
    return torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)


def _last_rows(chunks: list[Chunk], ends: list[Chunk]) -> list[int]:
    """Row of the last token of each chunk in `ends`, within the packed batch."""
    rows, end = {}, 0
    for chunk in chunks:
        end += chunk.length
        rows[id(chunk)] = end - 1
    return [rows[id(chunk)] for chunk in ends]
