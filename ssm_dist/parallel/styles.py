"""Styles: how the parameters of one kind of module are laid out over ranks, and where it communicates.

A style is applied to a module from outside. It names the dimension along which each of the module's own
parameters is split (always evenly, in rank order), and may replace the module's forward by one that reduces.
The module itself stays an ordinary `nn.Module` that knows nothing of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol, cast

from torch import Tensor, nn

from ssm_dist.kernels import add_rms_norm, linear
from ssm_dist.parallel.collectives import (
    pushes_product,
    splits_residual,
    sums_in_place,
    tp_all_reduce_add_rms_norm,
    tp_all_reduce_add_rms_norm_split,
    tp_all_reduce_spent,
    tp_gather_rows,
    tp_linear_all_reduce,
    tp_linear_all_reduce_add_rms_norm,
)
from ssm_dist.parallel.feedback import feeds_back, sum_with_feedback
from ssm_dist.parallel.interleaving import begin_left_sum, beside, in_halves
from ssm_dist.parallel.mesh import TensorParallel


class HasHeads(Protocol):
    """A projection within heads: `heads` counts them over all ranks."""

    heads: int


class HasEpsilon(Protocol):
    """An RMS norm with its epsilon."""

    eps: float


def heads_of(module: nn.Module) -> int:
    """Heads of a module, over all ranks."""
    return cast(HasHeads, module).heads


def weight_of(module: nn.Module) -> Tensor:
    """The module's weight as it is at the moment: localising and quantising replace it."""
    return module.get_parameter("weight")


@dataclass(frozen=True)
class Reduction:
    """What a module sends over the ranks, for the plan's table."""

    kind: str
    """all-reduce, all-gather, or a note on who reduces later."""
    width: int
    """Numbers a token."""
    ranks: int


@dataclass(frozen=True)
class Style:
    """Replicated parameters, no communication; the base of the other styles."""

    padded: ClassVar[bool] = False
    """The sharded dimension is padded to the degree by whoever builds the model (the vocabulary)."""

    def shards(self, module: nn.Module) -> dict[str, int]:
        """Sharded dimension of each own parameter that is not replicated."""
        return {}

    def true_form(self, module: nn.Module, name: str, parameter: Tensor, degree: int) -> Tensor:
        """A parameter in the form in which its shards are plain slices, and which `shards` refers to.

        Packed halves become a dimension of their own there. Raises `UserError` where its shape does not fit.
        """
        return parameter

    def objections(self, module: nn.Module) -> list[str]:
        """What makes the module unfit at every degree; messages put its path before each."""
        return []

    def misfit(self, module: nn.Module, degree: int) -> str | None:
        """Why the degree does not suit the module, besides a dimension that it does not divide."""
        return None

    def install(self, module: nn.Module, tp: TensorParallel) -> None:
        """Add this style's communication to the module; called on all ranks in the same order."""

    def reduction(self, module: nn.Module, degree: int) -> Reduction | None:
        """What `install` makes the module send."""
        return None


class Replicated(Style):
    """Every rank holds the whole parameters."""


@dataclass(frozen=True)
class Sharded(Style):
    """Parameters split along the named dimensions: Sharded({"weight": 0, "bias": 0}); a bias is optional."""

    dims: dict[str, int] = field(default_factory=dict)

    def shards(self, module: nn.Module) -> dict[str, int]:
        biasless = module._parameters.get("bias") is None
        return {name: dim for name, dim in self.dims.items() if not (name == "bias" and biasless)}


def Colwise() -> Sharded:
    """A linear whose outputs are split: weight (d_out, ...), bias (d_out,)."""
    return Sharded({"weight": 0, "bias": 0})


def PackedColwise() -> Sharded:
    """Two linears in one parameter (2, d_out, d_in), both split along their outputs."""
    return Sharded({"weight": 1, "bias": 1})


@dataclass(frozen=True)
class BeforeScan(Sharded):
    """The linear that a scan follows: `Sharded`, and where a sum of the other half of a step begins."""

    def install(self, module: nn.Module, tp: TensorParallel) -> None:
        module.register_forward_hook(lambda *_: begin_left_sum())


def ColwiseBeforeScan() -> BeforeScan:
    """`Colwise` for dt_proj: see `interleaving`."""
    return BeforeScan({"weight": 0, "bias": 0})


class DeferredLinear(NamedTuple):
    """x W^T of x (T, K) and a weight (N, K), left to the norm that sums it over the ranks."""

    x: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Rowwise(Style):
    """A linear whose inputs are split: its output is a partial sum, left for the next `ReduceAddNorm`.

    A bias stays whole and is added by the first rank alone, so that the sum contains it once.
    """

    dim: int = 1
    """The dimension of the weight that holds the inputs."""
    before_norm: bool = False
    """Its output goes to a `ReduceAddNorm` as it is, which may get a `DeferredLinear` and multiply."""

    def shards(self, module: nn.Module) -> dict[str, int]:
        return {"weight": self.dim}

    def install(self, module: nn.Module, tp: TensorParallel) -> None:
        if getattr(module, "bias", None) is not None:
            if tp.rank > 0:
                module.forward = lambda x: linear(x, weight_of(module))
        elif self.before_norm:
            whole, group, wire = module.forward, tp.group, tp.reductions.branch

            def forward(x: Tensor) -> Tensor | DeferredLinear:
                rows = x.flatten(1), weight_of(module).flatten(1)
                if in_halves() or not pushes_product(*rows, group, wire, with_norm=True):
                    return whole(x)
                return DeferredLinear(*rows)

            module.forward = forward

    def reduction(self, module: nn.Module, degree: int) -> Reduction | None:
        return Reduction("partial, reduced at the next norm", weight_of(module).shape[0], degree)


@dataclass(frozen=True)
class ReduceAddNorm(Style):
    """The seam between layers: reduces the branch, adds it to the residual stream, normalises.

    The module has `weight`, `eps` and forward(branch | None, residual | None, appended | None); see
    `kernels.add_rms_norm`. With appended columns, a residual stream that was split becomes whole.
    """

    may_split: bool = False
    """Only such norms read the residual stream: between them it may stay split over the ranks, by rows."""

    def install(self, module: nn.Module, tp: TensorParallel) -> None:
        group, degree, wire = tp.group, tp.degree, tp.reductions.branch
        how = (wire.codec, wire.group_size, wire.algorithm)

        def forward(
            branch: Tensor | DeferredLinear | None, residual: Tensor | None, appended: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            weight, eps = weight_of(module), cast(HasEpsilon, module).eps
            if branch is None:
                return add_rms_norm(None, residual, weight, eps, appended)
            if isinstance(branch, DeferredLinear):
                if appended is None:
                    return tp_linear_all_reduce_add_rms_norm(*branch, residual, weight, eps, group)
                total = tp_linear_all_reduce(*branch, group)
                return add_rms_norm(total, residual, weight, eps, appended)
            return beside(lambda: reduced(branch, residual, weight, eps, appended), group)

        def reduced(
            branch: Tensor, residual: Tensor | None, weight: Tensor, eps: float, appended: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            apart = appended is not None
            if apart and residual is not None and len(residual) < len(branch):
                residual = tp_gather_rows(residual, len(branch), group, degree)
            if residual is not None and feeds_back(branch, group, tp.reductions, with_norm=not apart):
                total, added = sum_with_feedback(branch, residual, group, tp.reductions)
                normed, stream = add_rms_norm(total, residual, weight, eps, appended)
                added(stream)
                return normed, stream
            if self.may_split and residual is not None and splits_residual(branch, group, *how):
                assert not apart, "a norm of more columns needs the whole stream"
                return tp_all_reduce_add_rms_norm_split(branch, residual, weight, eps, group, degree, *how)
            if apart or sums_in_place(branch, group, *how):
                total = tp_all_reduce_spent(branch, group, *how)
                return add_rms_norm(total, residual, weight, eps, appended)
            return tp_all_reduce_add_rms_norm(branch, residual, weight, eps, group, *how)

        module.forward = forward


@dataclass(frozen=True)
class HeadwiseReduce(Style):
    """x_proj: weight (channels, d_out) split by channels; the ranks that share a head sum their outputs.

    With as many heads as ranks, or more, nobody reduces. The module has `heads`, counted over all ranks.
    """

    def shards(self, module: nn.Module) -> dict[str, int]:
        return {"weight": 0}

    def misfit(self, module: nn.Module, degree: int) -> str | None:
        heads = heads_of(module)
        if heads % degree == 0 or degree % heads == 0:
            return None
        return f"has {heads} heads, which ranks cannot share evenly"

    def install(self, module: nn.Module, tp: TensorParallel) -> None:
        span = self._span(module, tp.degree)
        if span > 1:
            part, group, wire = module.forward, tp.subgroup(span), tp.reductions.x_proj

            def forward(x: Tensor) -> Tensor:
                by_output = weight_of(module).T
                if pushes_product(x, by_output, group, wire, with_norm=False):
                    return tp_linear_all_reduce(x, by_output, group)[:, None]
                return tp_all_reduce_spent(part(x), group, wire.codec, wire.group_size, wire.algorithm)

            module.forward = forward

    def reduction(self, module: nn.Module, degree: int) -> Reduction | None:
        span = self._span(module, degree)
        return Reduction("all-reduce", weight_of(module).shape[1], span) if span > 1 else None

    @staticmethod
    def _span(module: nn.Module, degree: int) -> int:
        """Ranks that share a head."""
        return max(1, degree // heads_of(module))
