"""The sampler of a batch: parameters indexed by slot on the device, tokens chosen without asking the host.

Everything that `Sampler.sample` does depends on device tensors and on `Sampler.work`, which the host changes
when requests come and go. So a step can be compiled whole, and captured in a CUDA graph for each value of
`work`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssm_dist.kernels import largest
from ssm_dist.sampling.noise import as_int64, gumbel_noise
from ssm_dist.sampling.params import SamplingParams

_UNIT = 2.0**40  # probability 1 in fixed point: a vocabulary of 2**22 still adds up within an int64


class Work(NamedTuple):
    """What a step has to compute for the requests admitted; hashable, to tell captured steps apart."""

    penalise: bool = False
    draw: bool = False
    rank: bool = False
    logprobs: int | None = None


class Sampled(NamedTuple):
    """The outcome of a step. The log-probabilities are None when no request admitted wants them."""

    ids: Tensor
    """(S,) int64"""
    logprobs: Tensor | None
    """(S,) float32, of `ids` in the log-softmax of the unprocessed logits"""
    top_ids: Tensor | None
    """(S, n) int64, most likely first, equals in any order; n is the most that any request admitted wants"""
    top_logprobs: Tensor | None
    """(S, n) float32"""


class Sampler:
    """Samples for up to `max_sequences` slots; the same on every rank that is given the same logits.

    A row whose greatest logit is not finite is sampled greedily, NaN counting as the greatest: the lowest id
    that is NaN, else the lowest that is +inf, else (all -inf) id 0. Its log-probabilities are NaN.
    """

    def __init__(self, max_sequences: int, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._work: Work | None = Work()
        self._admitted: dict[int, SamplingParams] = {}
        self._written = [SamplingParams()] * max_sequences
        with self.device:
            self._greedy = torch.ones(max_sequences, dtype=torch.bool)
            self._temperature = torch.ones(max_sequences)
            self._top_k = torch.full((max_sequences,), vocab_size)
            self._top_p = torch.ones(max_sequences, dtype=torch.float64)
            self._log_min_p = torch.full((max_sequences,), -math.inf)
            self._penalty = torch.ones(max_sequences)
            self._seed = torch.zeros(max_sequences, dtype=torch.int64)
            self._tokens = torch.arange(vocab_size)
        self._seen: Tensor | None = None  # (max_sequences, vocab_size) bool, once a request has a penalty

    def admit(self, slot: int, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        """Take a request into a free slot. `prompt_ids` are all the tokens it has so far, for its penalty."""
        assert slot not in self._admitted, f"slot {slot} is taken; release it first"
        if _chooses(params) != _chooses(self._written[slot]):
            self._write(slot, params)
        if params.repetition_penalty != 1.0:
            self._remember(slot, prompt_ids)
        self._admitted[slot] = params
        self._work = None

    def release(self, slot: int) -> None:
        """Forget the request in this slot, if it has come that far."""
        self._admitted.pop(slot, None)
        self._work = None

    @property
    def work(self) -> Work:
        """What the next step has to compute."""
        if self._work is None:
            self._work = self._planned_work()
        return self._work

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Sampled:
        """Choose a token for each row, and record it for the row's repetition penalty.

        logits (S, vocab_size) of any float dtype; slots (S,) int, the slot of each row; positions (S,) int64,
        the place that the new token takes in its sequence.
        """
        slots = slots.long()
        if self.work != Work():  # greedy steps, of which each launch counts, take the numbers as they are
            logits = logits.float()
        scores = self._penalised(logits, slots)
        peak, ids = largest(scores)
        if self.work.draw:
            drawn = self._draw(scores - peak[:, None], slots, positions)
            ids = torch.where(self._greedy[slots] | ~peak.isfinite(), ids, drawn)
        if self.work.penalise:
            assert self._seen is not None
            # not by assignment: a scalar would be copied from the host, which a capture forbids
            self._seen.index_put_((slots, ids), torch.ones_like(ids, dtype=torch.bool))
        if self.work.logprobs is None:
            return Sampled(ids, None, None, None)
        normaliser = logits.logsumexp(dim=-1, keepdim=True)
        chosen = logits.gather(-1, ids[:, None]) - normaliser
        if self.work.logprobs == 0:  # views: torch 2.11 compiles no kernel of nothing
            return Sampled(ids, chosen.squeeze(-1), ids[:, None][:, :0], logits[:, :0])
        top, top_ids = logits.topk(min(self.work.logprobs, self.vocab_size), dim=-1)
        return Sampled(ids, chosen.squeeze(-1), top_ids, top - normaliser)

    def _write(self, slot: int, params: SamplingParams) -> None:
        """Tell the device: seven small launches, which slots taken again by requests alike can do without."""
        self._greedy[slot] = params.greedy
        self._temperature[slot] = 1.0 if params.greedy else params.temperature
        self._top_k[slot] = min(params.top_k or self.vocab_size, self.vocab_size)
        self._top_p[slot] = params.top_p
        self._log_min_p[slot] = math.log(params.min_p) if params.min_p > 0 else -math.inf
        self._penalty[slot] = params.repetition_penalty
        self._seed[slot] = as_int64(params.seed)
        self._written[slot] = params

    def _planned_work(self) -> Work:
        requests = self._admitted.values()
        return Work(
            penalise=any(params.repetition_penalty != 1.0 for params in requests),
            draw=any(not params.greedy for params in requests),
            rank=any(params.filters_by_rank for params in requests),
            logprobs=max(
                (params.logprobs for params in requests if params.logprobs is not None), default=None
            ),
        )

    def _remember(self, slot: int, token_ids: Sequence[int]) -> None:
        if self._seen is None:
            self._seen = torch.zeros(len(self._seed), self.vocab_size, dtype=torch.bool, device=self.device)
        self._seen[slot] = False
        self._seen[slot, torch.tensor(token_ids, dtype=torch.int64, device=self.device)] = True

    def _penalised(self, logits: Tensor, slots: Tensor) -> Tensor:
        """Repetition penalty of CTRL (Keskar et al. 2019, section 4.1); it multiplies negative logits."""
        if not self.work.penalise:
            return logits
        assert self._seen is not None
        penalty = self._penalty[slots, None]
        return torch.where(
            self._seen[slots], torch.where(logits < 0, logits * penalty, logits / penalty), logits
        )

    def _draw(self, scores: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """Sample ids (S,) from scores (S, V) whose row maximum is 0, through temperature and filters."""
        scores = scores / self._temperature[slots, None]
        # min-p compares with the likeliest token, which top-k and top-p always keep: its order is no matter.
        keep = scores >= self._log_min_p[slots, None]
        if self.work.rank:
            keep &= within_rank(scores, self._top_k[slots, None], self._top_p[slots, None])
        noise = gumbel_noise(self._seed[slots], positions, self._tokens)
        return (scores + noise).masked_fill(~keep, -math.inf).argmax(dim=-1)


def _chooses(params: SamplingParams) -> tuple[float, ...]:
    """What of a request's parameters the device has to know."""
    return (
        params.temperature, params.top_k, params.top_p, params.min_p, params.repetition_penalty, params.seed,
    )  # fmt: skip


def within_rank(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The tokens (S, V) bool that top-k and then top-p keep.

    scores (S, V) float32 are log-probabilities up to a constant, with row maximum 0; top_k (S, 1) int64 in
    1..V; top_p (S, 1) float64 in (0, 1]. Top-k keeps everything tied with the k-th token; top-p keeps the
    fewest tokens that reach it, the lowest ids among equals. Probabilities are added in fixed point, where
    order does not matter: a float cumulative sum on a GPU differs from run to run, and with the batch.
    """
    ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
    in_top_k = ordered >= ordered.gather(-1, top_k - 1)
    weights = ((ordered.exp() * _UNIT) * in_top_k).long()
    before = weights.cumsum(dim=-1) - weights
    enough = (weights.sum(dim=-1, keepdim=True) * top_p).ceil().long()
    keep = in_top_k & ((before < enough) | (top_p == 1.0))
    # What is kept leads the sorted order, so its last token tells it apart. A row of NaN keeps nothing.
    last = (keep.sum(dim=-1, keepdim=True) - 1).clamp_min(0)
    value, last_id = ordered.gather(-1, last), ids.gather(-1, last)
    tokens = torch.arange(scores.shape[-1], device=scores.device)
    return (scores > value) | ((scores == value) & (tokens <= last_id))
