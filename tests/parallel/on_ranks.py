"""What the tests of plans and reductions run on ranks; without slow imports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ssm_dist.models.batch import KVPages, MixerState, ModelState, RaggedBatch
from ssm_dist.models.language_model import LanguageModelConfig
from ssm_dist.parallel import Plan, TensorParallel, apply_plan, localise
from ssm_dist.parallel.collectives import (
    Reductions,
    broadcast_bytes,
    tp_all_gather,
    tp_all_max,
    tp_all_reduce,
)
from ssm_dist.parallel.collectives.groups import group_named
from ssm_dist.parallel.vocabulary import target_log_probs
from ssm_dist.registry import spec_for

TOKENS = 3


def all_ranks() -> TensorParallel:
    return TensorParallel.over_all_ranks("cpu")


# --- placements ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """One parameter as a rank sees it before localising, and the shape it has after."""

    is_dtensor: bool
    placement: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    localised: tuple[int, ...]


def placed_parameters(model_type: str, config: LanguageModelConfig) -> dict[str, Placed]:
    """Apply the plan to a meta model, look, and localise."""
    model = meta_model(model_type, config)
    apply_plan(model, all_ranks(), spec_for(model_type).plan)
    before = {path: parameter.data for path, parameter in model.named_parameters()}
    localise(model)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert not any(isinstance(parameter.data, DTensor) for parameter in after.values())
    return {
        path: Placed(
            isinstance(tensor, DTensor), str(*tensor.placements), tuple(tensor.shape),
            tuple(tensor.to_local().shape), tuple(after[path].shape),
        )
        for path, tensor in before.items()
    }  # fmt: skip


def tie_survives(model_type: str, config: LanguageModelConfig) -> tuple[bool, bool]:
    """Whether head and embedding are one parameter after applying the plan, and after localising."""
    model = meta_model(model_type, config)
    apply_plan(model, all_ranks(), spec_for(model_type).plan)
    placed = model.head.weight is model.embedding.weight
    localise(model)
    return placed, model.head.weight is model.embedding.weight


def meta_model(model_type: str, config: LanguageModelConfig) -> nn.Module:
    with torch.device("meta"):
        return spec_for(model_type).build(config)


# --- styles -------------------------------------------------------------------------------------------------


def sharded_output(build: Callable[..., nn.Module], sizes: tuple[Any, ...], plan: Plan, *inputs: Any) -> Any:
    """The output on this rank of a small module under a plan, with the weights of `random_module`."""
    with torch.device("meta"):
        model = build(*sizes)
    tp = all_ranks()
    placements = apply_plan(model, tp, plan).parameters
    localise(model)
    whole = random_module(build, *sizes).state_dict()
    own = {p.path: whole[p.path][(slice(None),) * (p.dim or 0) + (p.slice(tp.rank),)] for p in placements}
    model.load_state_dict(own, assign=True)
    with torch.inference_mode():
        return model(*inputs)


def random_module(build: Callable[..., nn.Module], *sizes: Any) -> nn.Module:
    """The module with normal weights, the same on every call."""
    module, generator = build(*sizes), torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return module


def sent_by_a_forward(model_type: str, config: LanguageModelConfig) -> list[tuple[int, int]]:
    """(numbers a token, ranks) of every all-reduce of one prefill, in order."""
    model, tp = meta_model(model_type, config), all_ranks()
    apply_plan(model, tp, spec_for(model_type).plan)
    localise(model)
    model.to_empty(device="cpu")
    sent = []

    def record(x: Tensor, group: dist.ProcessGroup, **_: Any) -> mock.Mock:
        sent.append((x.numel() // TOKENS, dist.get_world_size(group)))
        return mock.Mock()

    with mock.patch.object(dist, "all_reduce", record), torch.inference_mode():
        model(*one_sequence(model))
    return sent


def one_sequence(model: nn.Module) -> tuple[RaggedBatch, ModelState]:
    shapes = model.state_shapes()
    batch = RaggedBatch(
        torch.zeros(TOKENS, dtype=torch.int64), torch.tensor([0, TOKENS], dtype=torch.int32),
        torch.tensor([0], dtype=torch.int32), torch.arange(TOKENS), pages=torch.tensor([[0]]),
    )  # fmt: skip
    mixers = [
        MixerState(torch.zeros(1, *shapes.conv), torch.zeros(1, *shapes.ssm)) for _ in range(shapes.layers)
    ]
    page = (1, TOKENS, *shapes.kv)
    sites = [KVPages(torch.zeros(page), torch.zeros(page)) for _ in range(shapes.attention_sites)]
    return batch, ModelState(mixers, sites)


# --- collectives --------------------------------------------------------------------------------------------


def rank_tensor(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that differ from rank to rank, and that every rank can compute."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


@dataclass(frozen=True)
class Sent:
    """An input before and after a collective, and its output."""

    before: Tensor
    after: Tensor
    output: Tensor
    fresh: bool
    """The output shares no memory with the input."""


def collective(op: str, shape: tuple[int, ...], dtype: torch.dtype, strided: bool = False) -> Sent:
    tp = all_ranks()
    x = rank_tensor(tp.rank, *shape, dtype=dtype)
    if strided:
        x = x.repeat_interleave(2, dim=-1)[..., ::2]
    before = x.clone()
    if op == "gather":
        output = tp_all_gather(x, tp.group, tp.degree)
    else:
        output = {"sum": tp_all_reduce, "max": tp_all_max}[op](x, tp.group)
    fresh = output.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    return Sent(before, x, output, fresh)


def subgroup_sum(span: int) -> tuple[float, bool]:
    """The sum of ranks over a subgroup, and whether asking again makes another group."""
    tp = all_ranks()
    name = tp.subgroup(span)
    with mock.patch.object(dist, "new_subgroups") as made:
        again = tp.subgroup(span)
    return tp_all_reduce(torch.tensor([float(tp.rank)]), again).item(), made.called or again != name


def patience_of_a_later_model() -> list[float]:
    """Seconds that the groups wait, when a second model asks for other seconds than the first."""
    for seconds in (7.0, 9.0):
        tp = TensorParallel.over_all_ranks("cpu", Reductions(timeout_seconds=seconds))
        names = [tp.group, tp.subgroup(2), tp.host_group()]
    return [group_named(name).timeout_seconds for name in names]


def check_ops() -> None:
    """torch's own check of the schemas, the fake implementations and functionalisation."""
    tp = all_ranks()
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for x in (rank_tensor(tp.rank, 3, 4), rank_tensor(tp.rank, 4, 3).T):
        torch.library.opcheck(tp_all_reduce, (x, tp.group), test_utils=checks)
        torch.library.opcheck(tp_all_gather, (x, tp.group, tp.degree), test_utils=checks)


def compiled_and_eager(backend: str) -> tuple[Tensor, Tensor]:
    """A function with reductions inside, compiled as one graph, and as it is."""
    tp = all_ranks()

    def step(x: Tensor) -> Tensor:
        whole = tp_all_reduce(torch.sin(x), tp.group) + 1
        return tp_all_gather(torch.cos(whole), tp.group, tp.degree) * 2

    x = rank_tensor(tp.rank, 5, 6)
    return torch.compile(step, backend=backend, fullgraph=True)(x), step(x)


def broadcast(payload: bytes) -> bytes:
    """What arrives where rank 0 sends the payload, and the others something else."""
    tp = all_ranks()
    return broadcast_bytes(payload if tp.rank == 0 else b"other", tp.group, torch.device("cpu"))


def shard_log_probs(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """`target_log_probs` with this rank's columns of the whole logits."""
    tp = all_ranks()
    return target_log_probs(logits.chunk(tp.degree, dim=1)[tp.rank], targets, vocab_size, tp)
