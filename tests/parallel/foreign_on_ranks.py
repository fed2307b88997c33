"""What the tests of foreign models run on ranks. transformers is imported inside: it takes seconds."""

from __future__ import annotations

from torch import Tensor

from ssm_dist.parallel import shard_module
from tests.parallel.on_ranks import all_ranks


def sharded(name: str, prompt: list[int], count: int) -> tuple[Tensor, list[int]]:
    """Logits of a prompt, and `count` greedy tokens after it, of a model sharded by its class's own plan."""
    from tests import oracle
    from tests.parallel.foreign_models import build

    model = build(name)
    shard_module(model, all_ranks())
    return oracle.logits(model, prompt), oracle.greedy(model, prompt, count)
