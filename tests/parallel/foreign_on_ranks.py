"""What the tests of foreign models run on ranks. transformers is imported inside: it takes seconds."""

from __future__ import annotations

import torch
from torch import Tensor

from ssm_dist.parallel import (
    PackedBlocks,
    Plan,
    Reductions,
    RowwiseReduce,
    TensorParallel,
    Wire,
    shard_module,
)
from tests.parallel.on_ranks import all_ranks


def sharded(name: str, prompt: list[int], count: int, cached: bool = True) -> tuple[Tensor, list[int]]:
    """Logits of a prompt, and `count` greedy tokens after it, of a model sharded by its class's own plan."""
    from tests import oracle
    from tests.parallel.foreign_models import build

    model = build(name)
    shard_module(model, all_ranks())
    return oracle.logits(model, prompt), oracle.greedy(model, prompt, count, cached)


def sharded_toy(x: Tensor, in_the_plan: Wire | None, for_all: Wire) -> Tensor:
    """A packed module's output, its sum travelling as the plan or the ranks say."""
    from tests.parallel.toys import Packed

    torch.manual_seed(4)
    model = Packed(pairs=False, width=64, channels=128)
    tp = TensorParallel.over_all_ranks("cpu", Reductions(branch=for_all))
    plan: Plan = {"into": PackedBlocks(), "out": RowwiseReduce(in_the_plan or "branch")}
    shard_module(model, tp, plan)
    with torch.inference_mode():
        output: Tensor = model(x)
    return output
