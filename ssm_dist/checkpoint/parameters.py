"""Putting real tensors where a meta model has placeholders: what a rank holds, and how it goes in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True)
class Held:
    """The part of a parameter that this rank holds: `[start, start + length)` along `dim`, or all of it."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    dim: int | None
    start: int
    length: int
    """With `dim=None`, `start` is 0 and `length` the size of the first dimension."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of the part."""
        return tuple(self.length if d == self.dim else n for d, n in enumerate(self.shape))


def held(parameter: Tensor) -> Held:
    """What this rank holds of a parameter: an even, contiguous shard of a DTensor, otherwise the whole."""
    shape = tuple(parameter.shape)
    if isinstance(parameter, DTensor):
        (placement,) = parameter.placements
        if isinstance(placement, Shard):
            length, rest = divmod(shape[placement.dim], parameter.device_mesh.size())
            assert rest == 0, f"{shape} is not evenly sharded along {placement.dim}"
            return Held(shape, placement.dim, parameter.device_mesh.get_local_rank() * length, length)
    return Held(shape, None, 0, shape[0])


def replace_parameters(model: nn.Module, local: Mapping[str, Tensor]) -> None:
    """Give every parameter its local tensor (by the path under which `named_parameters` lists it).

    A DTensor stays one, with its mesh and placement; parameters that were tied stay one object.
    """
    replacement = {id(old): _like(old, local[path]) for path, old in model.named_parameters()}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                module._parameters[name] = replacement[id(old)]


def _like(parameter: nn.Parameter, local: Tensor) -> nn.Parameter:
    if isinstance(parameter, DTensor):
        placed = cast(DTensor, parameter)
        local = DTensor.from_local(
            local,
            placed.device_mesh,
            placed.placements,
            run_check=False,
            shape=torch.Size(placed.shape),
            stride=placed.stride(),
        )
    return nn.Parameter(local, requires_grad=False)
