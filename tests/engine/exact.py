"""A model of integers that remembers everything: any mix-up of slots, pages or chunks changes its tokens.

Its state is a hash of the tokens absorbed, and its keys are the tokens themselves, so the next token depends
on every earlier one through the state and again through the pages. All numbers are exact in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssm_dist.engine import Engine
from ssm_dist.models.batch import ModelState, RaggedBatch, StateShapes
from ssm_dist.sampling.sampler import Sampler
from ssm_dist.state_cache import HostState, StateCache
from ssm_dist.state_sizes import PAGE_TOKENS, pages_of

VOCAB = 23
MODULUS = 4093
PURE = StateShapes(conv=(1, 1), ssm=(1, 1), layers=1)
HYBRID = StateShapes(conv=(1, 1), ssm=(1, 1), layers=1, attention_sites=1, kv=(1, 1))


class ExactModel(nn.Module):
    """Hidden states (T, 1): a number that `head` maps to one certain token."""

    def __init__(self, padding_slot: int) -> None:
        super().__init__()
        self.padding_slot = padding_slot
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, batch: RaggedBatch, state: ModelState) -> Tensor:
        tokens, offsets = batch.tokens.tolist(), batch.seq_offsets.tolist()
        hidden = []
        for s, slot in enumerate(batch.slots.tolist()):
            conv, ssm = state.mixers[0].conv[slot], state.mixers[0].ssm[slot]
            value = int(ssm)
            for at in range(offsets[s], offsets[s + 1]):
                in_place = int(conv) == int(batch.positions[at]) or slot == self.padding_slot
                assert in_place, "the state is not where the tokens are"
                conv += 1
                value = (value * 31 + tokens[at] + 1) % MODULUS
                hidden.append(float(value + self._attend(batch, state, s, at)))
            ssm.fill_(value)
        return torch.tensor(hidden)[:, None]

    def head(self, hidden: Tensor) -> Tensor:
        """One-hot logits (rows, VOCAB)."""
        return nn.functional.one_hot(hidden[:, 0].long() % VOCAB, VOCAB).float()

    def _attend(self, batch: RaggedBatch, state: ModelState, s: int, at: int) -> int:
        """Write this token's key; a sum over all keys so far, weighted by place."""
        if batch.pages is None:
            return 0
        keys, position = state.attention[0].keys, int(batch.positions[at])
        keys[int(batch.pages[s, position // keys.shape[1]]), position % keys.shape[1]] = batch.tokens[at]
        seen = keys[batch.pages[s].long()].flatten()[: position + 1]
        return int((seen * torch.arange(1, position + 2)).sum()) % MODULUS


def exact_continuation(prompt: list[int], count: int, *, paged: bool) -> list[int]:
    """What the model answers, from its definition alone."""
    tokens, value = list(prompt), 0
    for token in prompt:
        value = (value * 31 + token + 1) % MODULUS
    while True:
        attended = sum((i + 1) * token for i, token in enumerate(tokens)) % MODULUS if paged else 0
        tokens.append((value + attended) % VOCAB)
        if len(tokens) == len(prompt) + count:
            return tokens[len(prompt) :]
        value = (value * 31 + tokens[-1] + 1) % MODULUS


def exact_engine(shapes: StateShapes, max_sequences: int, max_tokens: int, snapshots: int = 0) -> Engine:
    """An engine of that model."""
    cache = StateCache(
        shapes, max_sequences=max_sequences, max_tokens=max_tokens, dtype=torch.float32,
        state_dtype=torch.float32, device=torch.device("cpu"), snapshots=snapshots,
    )  # fmt: skip
    model = ExactModel(cache.padding_slot)
    return Engine(model, cache, Sampler(max_sequences + 1, VOCAB, "cpu"), VOCAB)  # type: ignore[arg-type]


def exact_state(tokens: list[int], *, paged: bool) -> HostState:
    """The model's state after these tokens, from its definition alone."""
    value = 0
    for token in tokens:
        value = (value * 31 + token + 1) % MODULUS
    kv = torch.zeros(int(paged), 2, pages_of(len(tokens)), PAGE_TOKENS, 1, 1)
    if paged:
        kv[0, 0].view(-1)[: len(tokens)] = torch.tensor(tokens, dtype=torch.float32)
    return HostState(torch.full((1, 1, 1), float(len(tokens))), torch.full((1, 1, 1), float(value)), kv)
