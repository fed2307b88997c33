"""Memory for the vectors that ranks send each other inside a kernel (`kernels.decode_layers`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssm_dist.kernels.decode_layers import RankWords, words_of_ranks
from ssm_dist.parallel.collectives.groups import group_named
from ssm_dist.parallel.collectives.selection import Wire, choose
from ssm_dist.parallel.collectives.shared import everybodys


def sums_at_once(name: str, rows: Tensor, wire: Wire, *, with_norm: bool) -> bool:
    """Whether the ranks of a group would sum rows (T, N) like these one-shot.

    Then a kernel may send them itself, as they are, and add up what comes. By sizes, alike on all ranks.
    """
    how = (wire.codec, wire.group_size, wire.algorithm)
    return choose(group_named(name), rows, *how, with_norm) == "one_shot"


def agree(name: str, objection: str) -> str:
    """The first objection of any rank of a group, the same on all of them; empty where there is none."""
    group = group_named(name)
    if group.memory is None:
        return "since the ranks share no memory"
    return next((said for said in everybodys(group, objection) if said), "")


def open_words(name: str, d_model: int, device: torch.device) -> tuple[RankWords | None, str | None]:
    """Memory for vectors of `d_model` and smaller ones; or None, and why not, on all ranks alike.

    The group shares memory already, and all its ranks call this alike, before anything is captured.
    """
    import torch.distributed._symmetric_memory as symmetric_memory

    group = group_named(name)
    assert group.memory is not None
    made: tuple[Any, Tensor] | None = None
    problem = None
    try:
        words = symmetric_memory.empty(words_of_ranks(group.size, d_model), dtype=torch.int32, device=device)
        words.zero_()
        torch.cuda.synchronize(device)
        made = symmetric_memory.rendezvous(words, group.handle), words
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    problems = [p for p in everybodys(group, problem) if p is not None]  # nobody sends before all are ready
    if problems or made is None:
        return None, f"memory cannot be shared ({problems[0]})"
    push = group.memory.push
    return RankWords(group.rank, tuple(made[0].buffer_ptrs), push.error, push.limit, made), None
