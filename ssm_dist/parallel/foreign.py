"""Sharding a module that is loaded already, or that somebody else wrote, in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssm_dist.parallel.foreign_styles import ForeignStyle
from ssm_dist.parallel.mesh import TensorParallel
from ssm_dist.parallel.plan import ParameterPlacement, Plan, ResolvedPlan, resolve_plan
from ssm_dist.parallel.plans.ready import plan_for
from ssm_dist.parallel.styles import Style


def shard_module(
    model: nn.Module, tp: TensorParallel, plan: Plan | None = None, device: torch.device | None = None
) -> ResolvedPlan:
    """Turn a model into this rank's shard of it, in place: local tensors, adjusted attributes, reductions.

    model: loaded alike on every rank, or on the meta device. plan: by default that of its class (`plan_for`).
    device: where shards and buffers go, by default the mesh's. Whole parameters are freed as their shards are
    cut; no gradients. Collective: all ranks call it alike. Raises `UserError` as `resolve_plan`, before the
    model is changed.
    """
    resolved = resolve_plan(model, plan_for(model) if plan is None else plan, tp.degree)
    device = torch.device(tp.mesh.device_type) if device is None else device
    placements = {placement.path: placement for placement in resolved.parameters}
    for sites in _parameters_by_site(model):
        path, name = sites[0]
        module = model.get_submodule(path)
        placement = placements[f"{path}.{name}" if path else name]
        shard = _shard_of(module, name, placement, resolved.styles[path], tp)
        if not shard.is_meta:
            shard = shard.to(device)
        local = nn.Parameter(shard, requires_grad=False)
        for path, name in sites:
            model.get_submodule(path)._parameters[name] = local
    for path, style in resolved.styles.items():
        style.install(model.get_submodule(path), tp)
    _move_buffers(model, device)
    return resolved


def _parameters_by_site(model: nn.Module) -> list[list[tuple[str, str]]]:
    """For every parameter the modules' paths and names under which it is known: several where it is tied."""
    sites: dict[int, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                sites.setdefault(id(parameter), []).append((path, name))
    return list(sites.values())


def _shard_of(
    module: nn.Module, name: str, placement: ParameterPlacement, style: Style, tp: TensorParallel
) -> Tensor:
    """This rank's part of a module's whole parameter, in the form in which the module uses it."""
    whole = module.get_parameter(name).data
    part = style.true_form(module, name, whole, tp.degree)
    if placement.dim is not None:
        held = placement.slice(tp.rank)
        part = part.narrow(placement.dim, held.start, held.stop - held.start)
    if isinstance(style, ForeignStyle) and placement.dim is not None:
        part = style.splits(module)[name].own(part, tuple(whole.shape))
    return part.clone(memory_format=torch.contiguous_format)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
