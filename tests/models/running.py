"""Driving a model directly: batches and states put together by hand, without the engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ssm_dist.models.batch import KVPages, MixerState, ModelState, RaggedBatch
from ssm_dist.models.mixer import arrange_weights
from ssm_dist.parallel import TensorParallel, localise
from tests.checkpoint.ours import Ours, load_ours

SLOTS = 20
PAGE = 4
"""Tokens a page of keys and values; small, so that sequences have several."""


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Ours:
    """The model of a checkpoint folder on local tensors: all of it, or on ranks this rank's shard."""
    tp = TensorParallel.over_all_ranks("cpu") if dist.is_initialized() else None
    ours = load_ours(folder, tp, dtype)
    localise(ours.model)
    arrange_weights(ours.model)  # as `load_model` does
    return ours


class Run:
    """Sequences in flight. Slots and pages are dealt from shuffled decks; whatever nobody holds is NaN."""

    def __init__(self, ours: Ours, max_tokens: int = 160) -> None:
        self.model, self.vocab_size = ours.model, ours.config["vocab_size"]
        shapes = self.model.state_shapes()
        dealer = torch.Generator().manual_seed(0)
        self.free = torch.randperm(SLOTS, generator=dealer).tolist()
        self.tables = torch.randperm(SLOTS * -(-max_tokens // PAGE), generator=dealer).view(SLOTS, -1).int()
        self.lengths = [0] * SLOTS
        mixers = [
            MixerState(_nan(SLOTS, *shapes.conv), _nan(SLOTS, *shapes.ssm)) for _ in range(shapes.layers)
        ]
        kv_shape = (self.tables.numel(), PAGE, *shapes.kv)
        sites = [KVPages(_nan(*kv_shape), _nan(*kv_shape)) for _ in range(shapes.attention_sites)]
        self.state = ModelState(mixers, sites)

    def begin(self, sequences: int = 1) -> list[int]:
        """Slots for new sequences, their states zero."""
        slots = [self.free.pop() for _ in range(sequences)]
        for mixer in self.state.mixers:
            mixer.conv[slots] = 0
            mixer.ssm[slots] = 0
        return slots

    @torch.inference_mode()
    def step(self, slots: list[int], new: list[list[int]], decode: bool = False) -> list[Tensor]:
        """Append new tokens to each sequence; logits (len(new[s]), vocab_size) after each of them."""
        lengths = [len(tokens) for tokens in new]
        positions = [torch.arange(n) + self.lengths[slot] for slot, n in zip(slots, lengths, strict=True)]
        batch = RaggedBatch(
            tokens=torch.tensor([token for tokens in new for token in tokens], dtype=torch.int64),
            seq_offsets=torch.tensor([0, *lengths]).cumsum(0).int(),
            slots=torch.tensor(slots, dtype=torch.int32),
            positions=torch.cat(positions),
            decode=decode,
            pages=self.tables[slots] if self.state.attention else None,
        )
        logits = self.model.head(self.model(batch, self.state))[:, : self.vocab_size]
        for slot, n in zip(slots, lengths, strict=True):
            self.lengths[slot] += n
        return list(logits.split(lengths))

    def greedy(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        """`count` tokens after each prompt: all prompts in one prefill, then one decode a token."""
        slots = self.begin(len(prompts))
        last = [logits[-1:] for logits in self.step(slots, prompts)]
        written: list[list[int]] = [[] for _ in prompts]
        for _ in range(count):
            tokens = torch.cat(last).argmax(1).tolist()
            for so_far, token in zip(written, tokens, strict=True):
                so_far.append(token)
            last = self.step(slots, [[token] for token in tokens], decode=True)
        return written


def at_once(ours: Ours, tokens: list[int]) -> Tensor:
    """Logits (len(tokens), vocab_size) of one sequence in one step."""
    run = Run(ours)
    return run.step(run.begin(), [tokens])[0]


def in_chunks(ours: Ours, tokens: list[int], chunk: int) -> Tensor:
    """The same, `chunk` tokens a step."""
    run = Run(ours)
    slots = run.begin()
    chunks = [tokens[i : i + chunk] for i in range(0, len(tokens), chunk)]
    return torch.cat([run.step(slots, [new])[0] for new in chunks])


@dataclass(frozen=True)
class Outputs:
    """What one rank computes in `on_rank`."""

    at_once: Tensor
    in_chunks: Tensor
    greedy: list[list[int]]


def on_rank(folder: Path, prompts: list[list[int]], count: int, chunk: int) -> Outputs:
    """Logits of the last prompt, at once and in chunks, and `count` greedy tokens after each prompt."""
    ours = load(folder)
    return Outputs(
        at_once(ours, prompts[-1]), in_chunks(ours, prompts[-1], chunk), Run(ours).greedy(prompts, count)
    )


def _nan(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan)
