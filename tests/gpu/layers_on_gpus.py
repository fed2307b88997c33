"""What every rank does for `test_layers`; here, so that ranks need not import transformers."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssm_dist import LLM, SamplingParams
from ssm_dist.checkpoint.random_weights import random_parameters
from ssm_dist.config import KernelsConfig
from ssm_dist.fused_layers import fuse_layers
from ssm_dist.kernels import backend
from ssm_dist.models.batch import KVPages, MixerState, ModelState, RaggedBatch
from ssm_dist.models.falcon_mamba import FalconMamba, FalconMambaConfig
from ssm_dist.models.language_model import LanguageModel
from ssm_dist.models.mamba import Mamba, MambaConfig
from ssm_dist.models.mixer import arrange_weights
from ssm_dist.models.zamba import Zamba, ZambaConfig
from ssm_dist.parallel import Plan, Reductions, TensorParallel, Wire, apply_plan, localise
from ssm_dist.parallel.collectives import RankFailure, register_group, wait_for_event
from ssm_dist.parallel.collectives.shared import open_shared_memory
from ssm_dist.parallel.plans.falcon_mamba import FALCON_MAMBA_PLAN
from ssm_dist.parallel.plans.mamba import MAMBA_PLAN
from ssm_dist.parallel.plans.zamba import ZAMBA_PLAN
from ssm_dist.state_sizes import PAGE_TOKENS

SIZES: dict[str, dict[str, Any]] = {
    "mamba": {"d_model": 1024, "d_inner": 2048, "dt_rank": 64, "n_layers": 5},
    "wide mamba": {"d_model": 2560, "d_inner": 5120, "dt_rank": 160, "n_layers": 2},
    # on two GPUs, channels of a program that are no multiple of four
    "small mamba": {"d_model": 768, "d_inner": 1536, "dt_rank": 48, "n_layers": 4},
    "falcon": {"d_model": 1024, "d_inner": 2048, "dt_rank": 256, "n_layers": 4},
    "wide falcon": {"d_model": 4096, "d_inner": 8192, "dt_rank": 256, "n_layers": 3},
    # no multiples of 256; two heads
    "zamba": {
        "d_model": 1984, "d_inner": 3968, "dt_rank": 120, "n_layers": 5, "hybrid_layers": (1, 4),
        "attention_heads": 4, "attention_head_dim": 64, "d_mlp": 256,
    },
}  # fmt: skip
SLOTS = 10
PAGES = 1000 // PAGE_TOKENS + 1
"""Of a slot: for as many steps as there are at most."""
LENGTHS = [60, 20, 45, 7, 33, 12, 50]
PROMPTS: list[Any] = [[(17 * i + 5 * j) % 60 for j in range(10)] for i in range(7)]
NEAR_WRAP = 2**16 - 6
"""Exchanges so far: tags of words begin anew after a few."""
EXACT = Wire("none", 128, "auto")
IMPATIENT = 3.0
"""Seconds: more than 2 ** 31 nanoseconds, which the kernel takes as it takes longer times."""
KINDS: dict[str, tuple[Any, Any, Plan]] = {
    "mamba": (Mamba, MambaConfig, MAMBA_PLAN),
    "falcon": (FalconMamba, FalconMambaConfig, FALCON_MAMBA_PLAN),
    "zamba": (Zamba, ZambaConfig, ZAMBA_PLAN),
}
"""By how a name ends."""


@dataclass(frozen=True)
class Found:
    """Of one model on one rank."""

    fused: list[float]
    """Distance of each step's output from the definition in float32, over its length."""
    by_layers: list[float]
    """The same of the layers' own kernels."""
    states: tuple[float, float]
    """Distance of the scan's states after all steps, over their length: fused, by layers."""
    idle: bool
    """Whether the slot that no step has used is still what it was."""
    outputs: Tensor
    """(rows, d_model) of the fused steps, on the CPU."""


def found(name: str, steps: int, state_dtype: torch.dtype = torch.float32, most: int = 1) -> Found:
    """Fused steps, steps by layers and the definition, side by side over the same tokens.

    Steps have 1 to `most` sequences, by turns.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    tp = _ranks(60.0)
    with backend.using("triton", device):
        model, truth = _model(name, tp, device), _model(name, None, device).float()
        fuse_layers(model, tp, KernelsConfig(), "triton", device)
        stacks = model.stacks
        assert stacks
        states = [_states(m, device, state_dtype) for m in (model, model)]
        exact = _states(truth, device, torch.float32)
        errors: list[list[Tensor]] = [[], []]
        outputs = []
        draw, places = torch.Generator().manual_seed(1), [0] * SLOTS
        assert stacks[0].sequences >= most
        for place in stacks[0]._exchange.places.values():
            place.counters.fill_(NEAR_WRAP)
        for i in range(steps):
            slots = torch.randperm(SLOTS - 1, generator=draw)[: 1 + i % most].tolist()
            tokens = torch.randint(0, 60, (len(slots),), generator=draw).tolist()
            batch = _batch(tokens, slots, device, [places[slot] for slot in slots])
            for slot in slots:
                places[slot] += 1
            with backend.using("reference", device):
                expected = truth(batch, exact)
            for way, state in enumerate(states):
                model.stacks = stacks if way == 0 else []
                y = model(batch, state)
                errors[way].append((y - expected).norm() / expected.norm())
                if way == 0:
                    outputs.append(y.clone())
    mine = slice(0, None) if tp is None else _part(tp, exact.mixers[0].ssm.shape[1])
    apart = [_states_apart(state, exact, mine) for state in states]
    idle = all(bool((m.ssm[-1] == 1).all() and (m.conv[-1] == 1).all()) for m in states[0].mixers)
    fused, by_layers = (torch.stack(each).tolist() for each in errors)
    return Found(fused, by_layers, (apart[0], apart[1]), idle, torch.cat(outputs).cpu())


def replays(name: str, steps: int) -> bool:
    """Whether captured steps have the bits of steps as written, each with other inputs, states included."""
    device = torch.device("cuda", torch.cuda.current_device())
    with backend.using("triton", device):
        model = _model(name, None, device)
        fuse_layers(model, None, KernelsConfig(), "triton", device)
        states = [_states(model, device, torch.float32) for _ in range(2)]
        batch = _batch([0], [0], device)
        token, slot = batch.tokens, batch.slots
        model(batch, states[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = model(batch, states[0])
        states[0] = _zeroed(states[0])
        same = True
        for i in range(steps):
            token.fill_(7 * i % 60)
            slot.fill_(i % (SLOTS - 1))
            graph.replay()
            same &= torch.equal(replayed, model(batch, states[1]))
    pairs = zip(states[0].mixers, states[1].mixers, strict=True)
    return same and all(torch.equal(a.ssm, b.ssm) and torch.equal(a.conv, b.conv) for a, b in pairs)


def _zeroed(state: ModelState) -> ModelState:
    for mixer in state.mixers:
        mixer.conv[:-1], mixer.ssm[:-1] = 0, 0
    return state


def answers(folder: Path, fused: bool, mode: str) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and log-probabilities of requests for `PROMPTS`, one by one, then at once with other lengths."""
    llm = LLM.from_config(_config(folder, fused, mode))
    lengths = [SamplingParams(max_new_tokens=n, ignore_eos=True, logprobs=0) for n in LENGTHS]
    done = [completion for prompt in PROMPTS for completion in llm.generate([prompt], lengths[0])]
    done += llm.generate(PROMPTS, lengths)
    return [c.token_ids for c in done], [c.logprobs for c in done]


def without_a_rank() -> tuple[str, float]:
    """What rank 0 says when the last rank takes no part in a step, and after how many seconds."""
    device = torch.device("cuda", torch.cuda.current_device())
    tp = _ranks(IMPATIENT, "whose memory is then lost")
    assert tp is not None
    with backend.using("triton", device):
        model = _model("mamba", tp, device)
        fuse_layers(model, tp, KernelsConfig(), "triton", device)
        state = _states(model, device, torch.float32)
        model(_batch([1], [0], device), state)
        torch.cuda.synchronize()
        torch.distributed.barrier()
        if tp.rank == tp.degree - 1:
            time.sleep(10.0)
            return "", 0.0
        begun = time.monotonic()
        batch, hidden = _batch([2], [0], device), torch.ones(1, 1024, dtype=torch.bfloat16, device=device)
        # not through the embedding, whose sum would wait first
        model.stacks[0].step(hidden, None, batch.slots, *state.part(model.runs()[0]))
        done = torch.cuda.Event()
        done.record()
        try:
            wait_for_event(tp.group, done)
        except RankFailure as error:
            return str(error), time.monotonic() - begun
    return "no error", 0.0


def _config(folder: Path, fused: bool, mode: str) -> Any:
    from ssm_dist.config_reading import build_config

    degree = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    given = {
        "model": {"checkpoint": str(folder), "dtype": "bfloat16"},
        "parallel": {"tensor": degree}, "compile": {"mode": mode},
        "kernels": {"backend": "triton", "fuse_layers": "auto" if fused else "none"},
        "cache": {"max_sequences": 8},
    }  # fmt: skip
    return build_config(None, given, given_by="test")


def _ranks(timeout_seconds: float, name: str = "") -> TensorParallel | None:
    """All ranks; with a name, as a group of its own, whose memory nobody else uses."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return None
    tp = TensorParallel.over_all_ranks("cuda", Reductions(EXACT, EXACT, EXACT, timeout_seconds, False))
    if name:
        ranks = list(range(tp.degree))
        tp = replace(tp, group=register_group(name, torch.distributed.new_group(ranks), timeout_seconds))
    device = torch.device("cuda", torch.cuda.current_device())
    row_bytes = 4096 * 2
    assert open_shared_memory(tp.group, row_bytes, 64 * row_bytes, device)
    return tp


def _model(name: str, tp: TensorParallel | None, device: torch.device) -> LanguageModel:
    make: Any
    make, config, plan = next(kind for family, kind in KINDS.items() if name.endswith(family))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model: LanguageModel = make(config(vocab_size=64, tied_head=True, **SIZES[name]))
    finally:
        torch.set_default_dtype(default)
    if tp is not None:
        apply_plan(model, tp, plan)
    random_parameters(model, device=device, dtype=torch.bfloat16)
    localise(model)
    arrange_weights(model)
    return model.eval().requires_grad_(False)


def _states(model: LanguageModel, device: torch.device, state_dtype: torch.dtype) -> ModelState:
    """Zeros, and ones in the last slot."""
    shapes, dtype = model.state_shapes(), model.embedding.weight.dtype
    conv = torch.zeros(shapes.layers, SLOTS, *shapes.conv, dtype=dtype, device=device)
    ssm = torch.zeros(shapes.layers, SLOTS, *shapes.ssm, dtype=state_dtype, device=device)
    conv[:, -1], ssm[:, -1] = 1, 1
    sites = (shapes.attention_sites, 2, SLOTS * PAGES, PAGE_TOKENS, *shapes.kv)
    kv = torch.zeros(sites, dtype=dtype, device=device)
    return ModelState.of(MixerState(conv, ssm), [KVPages(*site) for site in kv])


def _batch(
    tokens: list[int], slots: list[int], device: torch.device, places: list[int] | None = None
) -> RaggedBatch:
    def ints(values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    whole, each = torch.int64, range(len(tokens))
    pages = ints([list(range(slot * PAGES, (slot + 1) * PAGES)) for slot in slots])
    return RaggedBatch(
        ints(tokens, whole), ints(range(len(tokens) + 1)), ints(slots),
        ints(places or [0 for _ in each], whole), decode=True, pages=pages,
    )  # fmt: skip


def _part(tp: TensorParallel, channels: int) -> slice:
    each = channels // tp.degree
    return slice(tp.rank * each, (tp.rank + 1) * each)


def _states_apart(state: ModelState, exact: ModelState, mine: slice) -> float:
    pairs = [
        (own.ssm[:-1].float(), true.ssm[:-1, mine])
        for own, true in zip(state.mixers, exact.mixers, strict=True)
    ]
    return max(float((own - true).norm() / true.norm()) for own, true in pairs)
