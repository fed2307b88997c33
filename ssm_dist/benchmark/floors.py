"""What a case cannot do without: bytes and operations, and how fast this device does them at best.

A decode step reads every weight that it multiplies by once (a shared block once a call; of an embedding that
is not the head too, only a few rows), every state once and writes it once, and reads the keys and values of
the context. Prefill does 2 operations a token for every such weight but the head's, 2 for every query and key
and every probability and value, and then, in kernels of its own, the scan's special functions: an exponential
a state, two for softplus and two for SiLU a channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ssm_dist.benchmark.cases import Case
from ssm_dist.kernel_benchmark.clock import Clock
from ssm_dist.llm import LLM
from ssm_dist.parallel import ParameterPlacement
from ssm_dist.state_sizes import slot_bytes


@dataclass(frozen=True)
class Ceilings:
    """A device's rates a second: bytes of a large copy, operations of a bf16 product, special functions."""

    bytes: float
    flops: float
    special: float


def ceilings_of(device: torch.device) -> Ceilings | None:
    """Measured now, with 2.6 GB of memory; None on a CPU."""
    if device.type != "cuda":
        return None
    ceilings = Ceilings(**Clock(device).ceilings())
    torch.cuda.empty_cache()
    return ceilings


def state_bytes(llm: LLM) -> int:
    """Of one sequence on one rank, without keys and values."""
    loaded = llm.loaded
    return slot_bytes(llm.model.state_shapes(), loaded.dtype, loaded.state_dtype)


def decode_bytes(llm: LLM, batch: int, context: float) -> float:
    """Bytes that one rank moves in a step of `batch` sequences with so many tokens of context each."""
    shapes = llm.model.state_shapes()
    weights = sum(p.local_bytes * calls for p, calls in _weights(llm))
    token = 2 * math.prod(shapes.kv) * llm.loaded.dtype.itemsize * shapes.attention_sites
    return weights + batch * (2 * state_bytes(llm) + context * token)


def decode_flop(llm: LLM, batch: int, context: float) -> float:
    """Operations of a step over all ranks."""
    head = 2 * llm.loaded.config.vocab_rows * llm.loaded.config.d_model
    return batch * (flop_a_token(llm) + head + _attention_flop(llm, context))


def prefill_flop(llm: LLM, case: Case) -> float:
    """Operations over all ranks."""
    tokens = case.batch * case.prompt_tokens
    return tokens * (flop_a_token(llm) + _attention_flop(llm, case.prompt_tokens / 2))


def prefill_floor(llm: LLM, case: Case, rates: Ceilings) -> float:
    """Seconds of the products, and of the scan's special functions after them."""
    config, tokens = llm.loaded.config, case.batch * case.prompt_tokens
    special = tokens * config.n_layers * config.d_inner * (config.d_state + 4)
    return (prefill_flop(llm, case) / rates.flops + special / rates.special) / llm.config.parallel.tensor


def flop_a_token(llm: LLM) -> int:
    """Operations of the projections for one prompt token, over all ranks."""
    return sum(
        2 * math.prod(p.shape) * calls
        for p, calls in _weights(llm)
        if len(p.shape) > 1 and not p.path.startswith(("embedding.", "head."))
    )


def _weights(llm: LLM) -> list[tuple[ParameterPlacement, int]]:
    """What a step multiplies by, and how often."""
    sites = llm.model.state_shapes().attention_sites
    tied = llm.loaded.config.tied_head
    return [
        (p, sites if p.path.startswith("shared.") else 1)
        for p in llm.loaded.plan.parameters
        if tied or not p.path.startswith("embedding.")
    ]


def _attention_flop(llm: LLM, context: float) -> float:
    """Operations of one token that attends to so many others, over all sites and ranks."""
    shapes = llm.model.state_shapes()
    return 4 * context * math.prod(shapes.kv) * shapes.attention_sites * llm.config.parallel.tensor
