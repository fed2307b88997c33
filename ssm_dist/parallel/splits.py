"""Splits: how one parameter of somebody else's module is divided, in the shape that the module gives it.

Where a plain slice would be wrong (packed halves, channels within heads), the parameter is first seen in its
true shape, in which a shard is a slice of one dimension; the shard then takes the module's own form again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ssm_dist.errors import UserError


@dataclass(frozen=True)
class Along:
    """Contiguous parts of one dimension."""

    dim: int
    """Of the parameter as the module has it."""

    @property
    def true_dim(self) -> int:
        """The split dimension of the true shape."""
        return self.dim

    def true(self, whole: Tensor, degree: int) -> Tensor:
        """The whole parameter in its true shape. Raises `UserError` where it cannot have that."""
        return whole

    def own(self, shard: Tensor, whole: tuple[int, ...]) -> Tensor:
        """A shard of the true shape in the module's form, `whole` being the module's unsharded shape."""
        return shard


@dataclass(frozen=True)
class Blocks(Along):
    """A dimension of several blocks, one after the other, as [x; z]: each block is split."""

    count: int = 2

    @property
    def true_dim(self) -> int:
        return self.dim + 1

    def true(self, whole: Tensor, degree: int) -> Tensor:
        _require_divisible(whole, self.dim, self.count, "blocks")
        return whole.unflatten(self.dim, (self.count, -1))

    def own(self, shard: Tensor, whole: tuple[int, ...]) -> Tensor:
        return shard.flatten(self.dim, self.dim + 1)


@dataclass(frozen=True)
class Groups(Along):
    """A dimension of small groups that stay together, as the pairs x0, z0, x1, z1, ..."""

    size: int = 2

    def true(self, whole: Tensor, degree: int) -> Tensor:
        _require_divisible(whole, self.dim, self.size, "entries a group")
        return whole.unflatten(self.dim, (-1, self.size))

    def own(self, shard: Tensor, whole: tuple[int, ...]) -> Tensor:
        return shard.flatten(self.dim, self.dim + 1)


@dataclass(frozen=True)
class WithinHeads(Along):
    """(heads, ...) with the channels of a head in `dim`: split by heads, within a head if ranks share it."""

    @property
    def true_dim(self) -> int:
        return 0

    def true(self, whole: Tensor, degree: int) -> Tensor:
        return whole.movedim(self.dim, 1).flatten(0, 1)

    def own(self, shard: Tensor, whole: tuple[int, ...]) -> Tensor:
        heads = max(1, shard.shape[0] // whole[self.dim])
        return shard.unflatten(0, (heads, -1)).movedim(1, self.dim)


@dataclass(frozen=True)
class PaddedRows(Along):
    """A dimension that is filled up with zeros to a multiple of the degree."""

    def true(self, whole: Tensor, degree: int) -> Tensor:
        missing = -whole.shape[self.dim] % degree
        return F.pad(whole, [0, 0] * (whole.dim() - 1 - self.dim) + [0, missing]) if missing else whole


def _require_divisible(whole: Tensor, dim: int, count: int, what: str) -> None:
    if whole.dim() <= dim:
        raise UserError(f"has {whole.dim()} dimensions, none numbered {dim}")
    if whole.shape[dim] % count:
        raise UserError(f"dimension {dim} has {whole.shape[dim]} entries, which is not {count} {what}")
