"""A vocabulary that is split over the ranks: embedding, head, and log-probabilities without whole logits."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_dist.parallel.collectives import tp_all_gather, tp_all_max, tp_all_reduce, tp_all_reduce_spent
from ssm_dist.parallel.mesh import TensorParallel
from ssm_dist.parallel.styles import Reduction, Style, weight_of


@dataclass(frozen=True)
class VocabParallelEmbedding(Style):
    """An embedding split by rows of the vocabulary; the lookup is summed exactly (one rank has the row)."""

    padded = True

    def shards(self, module: nn.Module) -> dict[str, int]:
        return {"weight": 0}

    def install(self, module: nn.Module, tp: TensorParallel) -> None:
        group, wire = tp.group, tp.reductions.embedding

        def forward(tokens: Tensor) -> Tensor:
            rows = weight_of(module).shape[0]
            local = tokens - tp.rank * rows
            mine = (local >= 0) & (local < rows)
            found = F.embedding(torch.where(mine, local, 0), weight_of(module))
            mine_only = torch.where(mine[:, None], found, 0)
            return tp_all_reduce_spent(mine_only, group, wire.codec, wire.group_size, wire.algorithm)

        module.forward = forward

    def reduction(self, module: nn.Module, degree: int) -> Reduction | None:
        return Reduction("all-reduce", weight_of(module).shape[1], degree)


@dataclass(frozen=True)
class VocabParallelHead(Style):
    """A head split by rows of the vocabulary; every rank gets the logits of the whole vocabulary."""

    padded = True

    def shards(self, module: nn.Module) -> dict[str, int]:
        return {"weight": 0}

    def install(self, module: nn.Module, tp: TensorParallel) -> None:
        module.register_forward_hook(
            lambda _module, _inputs, output: tp_all_gather(output, tp.group, tp.degree)
        )

    def reduction(self, module: nn.Module, degree: int) -> Reduction | None:
        return Reduction("all-gather of sampled rows", weight_of(module).shape[0], degree)


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
