"""Decides whether decode steps of a few sequences run many layers in one kernel, and prepares that."""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import nn

from ssm_dist.config import KernelsConfig
from ssm_dist.kernels.decode_layers import (
    Exchange,
    LayerStack,
    LayerWeights,
    RankWords,
    reason_against,
    sizes_of,
)
from ssm_dist.kernels.decode_sizes import Sizes, words_of_ranks
from ssm_dist.models.language_model import LanguageModel
from ssm_dist.models.layers import AddRMSNorm
from ssm_dist.models.mixer import MambaMixer
from ssm_dist.parallel import TensorParallel

logger = logging.getLogger(__name__)


def fuse_layers(
    model: LanguageModel,
    tp: TensorParallel | None,
    section: KernelsConfig,
    kernels: str,
    device: torch.device,
) -> None:
    """Give a loaded model its `stacks`, or say in the log why it has none; all ranks call it alike.

    kernels: the backend that runs; only `triton` has the kernel.
    """
    if device.type != "cuda":
        return
    weights, ranks, sizes = [_weights(layer) for layer in model.layers], None, {}
    why = objection(model, weights, section, kernels, device)
    if not why:
        sizes = _sizes(model, cast(list[LayerWeights], weights), tp)
    if tp is not None:
        ranks, why = _words(model, tp, why, sizes, device)
    if why:
        logger.info("decode: steps run layer by layer, %s", why)
        return
    model.stacks = _stacks(model, cast(list[LayerWeights], weights), tp, Exchange(sizes, device, ranks))
    most, count = max(sizes), len(model.stacks)
    logger.info(
        "decode: steps of %s run %d layers in %s, those of more layer by layer",
        f"up to {most} sequences" if most > 1 else "one sequence",
        len(weights),
        f"{count} kernels" if count > 1 else "1 kernel",
    )


def _mixer(layer: nn.Module) -> MambaMixer:
    mixer = layer.mixer
    assert isinstance(mixer, MambaMixer)
    return mixer


def _weights(layer: nn.Module) -> LayerWeights | None:
    norm = layer.norm
    assert isinstance(norm, AddRMSNorm)
    return _mixer(layer).with_norm(norm.weight)


def objection(
    model: LanguageModel, weights: list[LayerWeights | None], section: KernelsConfig, kernels: str,
    device: torch.device,
) -> str:  # fmt: skip
    """Why a model with these layers on a rank goes layer by layer, as far as one rank knows, or nothing."""
    if section.fuse_layers == "none" or kernels != "triton":
        return "as [kernels] asks"
    heads = _mixer(model.layers[0]).x_proj.heads_held
    for layer in weights:
        if layer is None:
            return "since its projections have biases"
        reason = reason_against(layer, heads, device)
        if reason is not None:
            return f"since {reason}"
    return ""


def _sizes(model: LanguageModel, weights: list[LayerWeights], tp: TensorParallel | None) -> Sizes:
    plain = len(model.runs()) == 1 and model.state_shapes().attention_sites == 0
    whole = plain and _mixer(model.layers[0]).x_proj.heads == 1
    return sizes_of(weights[0], 1 if tp is None else tp.degree, few=whole)


def _stacks(
    model: LanguageModel, weights: list[LayerWeights], tp: TensorParallel | None, exchange: Exchange
) -> list[LayerStack]:
    mixer, norm, runs = _mixer(model.layers[0]), model.final_norm, model.runs()
    return [
        LayerStack(
            weights[run.start : run.stop], exchange, norm.eps, rms_eps=mixer.mixer_rms_eps,
            last_norm=norm.weight if run is runs[-1] else None, heads=mixer.x_proj.heads_held,
            sharers=_sharers(mixer, tp),
        )
        for run in runs
    ]  # fmt: skip


def _sharers(mixer: MambaMixer, tp: TensorParallel | None) -> int:
    """Ranks that have parts of the same heads."""
    return 1 if tp is None else max(1, tp.degree // mixer.x_proj.heads)


def _words(
    model: LanguageModel, tp: TensorParallel, why: str, sizes: Sizes, device: torch.device
) -> tuple[RankWords | None, str]:
    """The memory of the ranks' vectors, and why there is none, or nothing. `why`: what is so far known."""
    from ssm_dist.parallel.collectives.words import agree, open_words, sums_at_once  # a CPU needs no Triton

    why = agree(tp.group, why, str(sizes))
    if why:
        return None, why
    mixer, like, wires = _mixer(model.layers[0]), model.final_norm.weight, tp.reductions
    branch, sums = (like.new_empty((1, n), device="meta") for n in (len(like), mixer.x_proj.weight.shape[1]))
    exact = sums_at_once(tp.group, branch, wires.branch, with_norm=True)
    if _sharers(mixer, tp) > 1:
        exact = exact and sums_at_once(tp.group, sums, wires.x_proj, with_norm=False)
    if not exact:
        return None, "since its sums over ranks go another way than one-shot"
    ranks, reason = open_words(tp.group, words_of_ranks(sizes), device)
    return ranks, "" if reason is None else f"since {reason}"
