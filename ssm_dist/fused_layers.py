"""Decides whether decode steps of one sequence run all layers in one kernel, and prepares that."""

from __future__ import annotations

import logging

import torch

from ssm_dist.config import KernelsConfig
from ssm_dist.kernels.decode_layers import LayerStack, LayerWeights, RankWords, reason_against
from ssm_dist.models.language_model import LanguageModel
from ssm_dist.models.mamba import Mamba, MambaLayer
from ssm_dist.parallel import TensorParallel

logger = logging.getLogger(__name__)


def fuse_layers(
    model: LanguageModel,
    tp: TensorParallel | None,
    section: KernelsConfig,
    kernels: str,
    device: torch.device,
) -> None:
    """Give a loaded `Mamba` its `LayerStack`, or say in the log why it has none; all ranks call it alike.

    kernels: the backend that runs; only `triton` has the kernel.
    """
    if not isinstance(model, Mamba) or device.type != "cuda":
        return
    if not section.fuse_layers or kernels != "triton":
        why = "as [kernels] asks"
    else:
        weights, why = _weights(model, device)
        ranks: RankWords | None = None
        if tp is not None:
            ranks, why = _words(model, tp, why, device)
        if not why:
            norm = model.final_norm
            rms_eps = _first(model).mixer.mixer_rms_eps
            model.stack = LayerStack(weights, norm.weight, norm.eps, rms_eps, ranks)
    how = f"layer by layer, {why}" if why else f"all {len(model.layers)} layers in one kernel"
    logger.info("decode: steps of one sequence run %s", how)


def _first(model: Mamba) -> MambaLayer:
    layer = model.layers[0]
    assert isinstance(layer, MambaLayer)
    return layer


def _weights(model: Mamba, device: torch.device) -> tuple[list[LayerWeights], str]:
    """Those of all layers, and why they cannot be served, or nothing."""
    weights = [layer.weights() for layer in model.layers if isinstance(layer, MambaLayer)]
    known = [w for w in weights if w is not None]
    if len(known) < len(weights):
        return [], "since its projections have biases"
    reasons = (reason_against(layer, device) for layer in known)
    return known, next((f"since {reason}" for reason in reasons if reason is not None), "")


def _words(model: Mamba, tp: TensorParallel, why: str, device: torch.device) -> tuple[RankWords | None, str]:
    """The memory of the ranks' vectors, and why there is none, or nothing. `why`: what is so far known."""
    from ssm_dist.parallel.collectives.words import agree, open_words, sums_at_once  # a CPU needs no Triton

    why = agree(tp.group, why)
    if why:
        return None, why
    layer = _first(model)
    d_model, outputs = layer.norm.weight.shape[0], layer.mixer.x_proj.weight.shape[1]
    like = layer.norm.weight
    branch, sums = like.new_empty((1, d_model), device="meta"), like.new_empty((1, outputs), device="meta")
    wires = tp.reductions
    exact = sums_at_once(tp.group, branch, wires.branch, with_norm=True)
    if not exact or not sums_at_once(tp.group, sums, wires.x_proj, with_norm=False):
        return None, "since its sums over ranks go another way than one-shot"
    ranks, reason = open_words(tp.group, d_model, device)
    return ranks, "" if reason is None else f"since {reason}"
