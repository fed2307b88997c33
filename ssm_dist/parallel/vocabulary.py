"""Log-probabilities over a vocabulary that is split over the ranks, without gathering the logits."""

import torch
from torch import Tensor

from ssm_dist.parallel.collectives import tp_all_max, tp_all_reduce
from ssm_dist.parallel.mesh import TensorParallel


def target_log_probs(logits: Tensor, targets: Tensor, vocab_size: int, tp: TensorParallel | None) -> Tensor:
    """log softmax(logits)[targets], the softmax taken over the first `vocab_size` columns of all ranks.

    logits: (rows, V_local), this rank's columns in rank order; the columns past vocab_size are padding.
    targets: (rows,) token ids below vocab_size. Returns (rows,) float32, the same on every rank.
    """
    columns, rank = logits.shape[1], 0 if tp is None else tp.rank
    index = rank * columns + torch.arange(columns, device=logits.device)
    wide = logits.float().masked_fill(index >= vocab_size, -torch.inf)
    peak = wide.amax(dim=1)
    if tp is not None:
        peak = tp_all_max(peak, tp.group)
    weight = (wide - peak[:, None]).exp().sum(1)
    local = targets - rank * columns
    mine = (local >= 0) & (local < columns)
    target = wide.gather(1, local.clamp(0, columns - 1)[:, None])[:, 0]
    sums = torch.stack([weight, torch.where(mine, target, 0.0)])
    if tp is not None:
        sums = tp_all_reduce(sums, tp.group)
    return sums[1] - peak - sums[0].log()
