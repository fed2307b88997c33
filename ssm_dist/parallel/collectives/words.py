"""Memory for the vectors that ranks send each other inside a kernel (`kernels.decode_layers`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssm_dist.kernels.decode_layers import RankWords
from ssm_dist.parallel.collectives.groups import group_named
from ssm_dist.parallel.collectives.selection import Wire, is_one_shot
from ssm_dist.parallel.collectives.shared import everybodys, rendezvous


def sums_at_once(name: str, rows: Tensor, wire: Wire, *, with_norm: bool) -> bool:
    """`is_one_shot`, by the group's name."""
    return is_one_shot(group_named(name), rows, wire, with_norm)


def agree(name: str, objection: str, sizes: str) -> str:
    """The first objection of any rank of a group, the same on all of them; empty where there is none.

    sizes: what has to be the same on all of them.
    """
    group = group_named(name)
    if group.memory is None:
        return "since the ranks share no memory"
    objections, sizes_of = zip(*everybodys(group, (objection, sizes)), strict=True)
    alike = "" if len(set(sizes_of)) == 1 else "since its ranks' GPUs are not alike"
    return next((said for said in objections if said), alike)


def open_words(name: str, words: int, device: torch.device) -> tuple[RankWords | None, str | None]:
    """Memory of so many words on each rank; or None, and why not, on all ranks alike.

    The group shares memory already, and all its ranks call this alike, before anything is captured.
    """
    group = group_named(name)
    assert group.memory is not None
    made, problem = rendezvous(group, 4 * words, Tensor.zero_, device)
    if problem is not None:
        return None, problem
    push = group.memory.push
    return RankWords(group.rank, tuple(made[0].buffer_ptrs), push.error, push.limit, made), None
