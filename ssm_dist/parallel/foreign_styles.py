"""Styles for modules that were not written for us: their own forward runs on the shard, unchanged.

Such code reads sizes from attributes, packs several weights into one, and expects whole outputs. So these
styles split packed parameters, adjust attributes, and reduce where a module would return a partial sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ssm_dist.errors import UserError
from ssm_dist.parallel.attributes import find, has, set_own
from ssm_dist.parallel.collectives import Wire, tp_all_gather, tp_all_reduce
from ssm_dist.parallel.mesh import TensorParallel
from ssm_dist.parallel.splits import Along, Blocks, Groups, PaddedRows, WithinHeads
from ssm_dist.parallel.styles import Reduction, Style, weight_of
from ssm_dist.parallel.summed import summed_product
from ssm_dist.parallel.vocabulary import VocabParallelEmbedding, VocabParallelHead

Travel = Wire | Literal["branch", "x_proj"]
"""How a sum travels: as given here, or as the `Reductions` of the ranks say for that kind."""


def reducer(tp: TensorParallel, wire: Travel, span: int | None = None) -> Callable[[Tensor], Tensor]:
    """The sum over all ranks, or over `span` neighbours."""
    group = tp.group if span is None else tp.subgroup(span)
    chosen = wire if isinstance(wire, Wire) else getattr(tp.reductions, wire)
    return lambda x: tp_all_reduce(x, group, chosen.codec, chosen.group_size, chosen.algorithm)


class ForeignStyle(Style):
    """A style that gives each split parameter one of `splits`, which may see it in another shape."""

    def splits(self, module: nn.Module) -> dict[str, Along]:
        """By name of the module's own parameters; the others are replicated."""
        return {}

    def shards(self, module: nn.Module) -> dict[str, int]:
        return {name: split.true_dim for name, split in self.splits(module).items()}

    def true_form(self, module: nn.Module, name: str, parameter: Tensor, degree: int) -> Tensor:
        split = self.splits(module).get(name)
        return parameter if split is None else split.true(parameter, degree)


@dataclass(frozen=True)
class Adjusted(ForeignStyle):
    """Parameters split as `dims` says, by a dimension or one of `splits`; attributes adjusted.

    Adjusted({"A_log": 0, "D": 0}, divided=("intermediate_size",))
    """

    dims: dict[str, int | Along] = field(default_factory=dict)
    divided: tuple[str, ...] = ()
    """Sizes that a rank has its part of. The split dimensions must have one of them. "config.x" gives the
    module a copy of its config first."""
    divisible: tuple[str, ...] = ()
    """Sizes that the degree must divide, though nothing reads them: "config.num_key_value_heads"."""
    values: dict[str, Any] = field(default_factory=dict)
    """Attributes set as they are: {"use_fast_path": False}."""
    reduced: Travel | None = None
    """The module's output is a partial sum, and is reduced like this."""

    def splits(self, module: nn.Module) -> dict[str, Along]:
        held = {n: d for n, d in self.dims.items() if n != "bias" or module._parameters.get(n) is not None}
        return {name: dim if isinstance(dim, Along) else Along(dim) for name, dim in held.items()}

    def objections(self, module: nn.Module) -> list[str]:
        missing = [name for name in (*self.divided, *self.divisible, *self.values) if not has(module, name)]
        if missing:
            return [f"has no {name!r}, which the plan adjusts" for name in missing]
        sizes = {name: find(module, name) for name in self.divided}
        listed = " or ".join(f"{name} = {size}" for name, size in sizes.items())
        lengths = {name: _length(module._parameters.get(name), s) for name, s in self.splits(module).items()}
        return [
            f"splits {name} along {length} entries, which is not {listed}"
            for name, length in lengths.items()
            if sizes and length is not None and length not in sizes.values()
        ]

    def misfit(self, module: nn.Module, degree: int) -> str | None:
        for name in (*self.divided, *self.divisible):
            if find(module, name) % degree:
                return f"has {name} = {find(module, name)}"
        return None

    def install(self, module: nn.Module, tp: TensorParallel) -> None:
        for name in self.divided:
            set_own(module, name, find(module, name) // tp.degree)
        for name, value in self.values.items():
            set_own(module, name, value)
        if self.reduced is not None:
            reduce = reducer(tp, self.reduced)
            module.register_forward_hook(lambda _module, _inputs, output: reduce(output))


def PackedBlocks(count: int = 2) -> Adjusted:
    """A linear (count * d_out, d_in) whose rows are blocks, as Mamba's [x; z]."""
    return Adjusted({"weight": Blocks(0, count), "bias": Blocks(0, count)})


def PackedPairs() -> Adjusted:
    """A linear (2 * d_out, d_in) whose rows are interleaved, as Zamba's x0, z0, x1, z1, ..."""
    return Adjusted({"weight": Groups(0), "bias": Groups(0)})


def ChannelConv() -> Adjusted:
    """A depthwise nn.Conv1d, its groups being the channels."""
    return Adjusted({"weight": 0, "bias": 0}, divided=("in_channels", "out_channels", "groups"))


@dataclass(frozen=True)
class RowwiseReduce(ForeignStyle):
    """A linear (d_out, d_in) whose inputs are split, and which sums its output over the ranks itself.

    RowwiseReduce(Wire("int8"))
    """

    wire: Travel = "branch"

    def splits(self, module: nn.Module) -> dict[str, Along]:
        return {"weight": Along(1)}

    def install(self, module: nn.Module, tp: TensorParallel) -> None:
        reduce, bias = reducer(tp, self.wire), module._parameters.get("bias")
        if bias is None:
            module.register_forward_hook(lambda _module, _inputs, output: reduce(output))
        else:  # which belongs into the sum once
            module.forward = lambda x: reduce(F.linear(x, weight_of(module))) + module.get_parameter("bias")

    def reduction(self, module: nn.Module, degree: int) -> Reduction | None:
        return Reduction("all-reduce", weight_of(module).shape[0], degree)


@dataclass(frozen=True)
class Headwise(Adjusted):
    """Parameters (heads, ...) used by the module's own forward; `dims` gives each one's dimension of a head's
    channels. Ranks hold whole heads, or where there are more ranks than heads, parts of one."""

    heads: str = ""
    """The attribute that counts heads."""
    head_dim: str = ""
    """The attribute with a head's channels."""
    summed: tuple[str, ...] = ()
    """Parameters that are multiplied with the channels: ranks that share a head sum that product."""
    wire: Travel = "x_proj"

    def splits(self, module: nn.Module) -> dict[str, Along]:
        return {name: WithinHeads(dim) for name, dim in self.dims.items() if isinstance(dim, int)}

    def objections(self, module: nn.Module) -> list[str]:
        names = (self.heads, self.head_dim, *self.divided)
        return [f"has no {name!r}, which the plan adjusts" for name in names if not has(module, name)]

    def misfit(self, module: nn.Module, degree: int) -> str | None:
        heads = find(module, self.heads)
        if heads % degree and degree % heads:
            return f"has {self.heads} = {heads}, which ranks cannot share evenly"
        return super().misfit(module, degree)

    def install(self, module: nn.Module, tp: TensorParallel) -> None:
        super().install(module, tp)
        heads, head_dim = find(module, self.heads), find(module, self.head_dim)
        span = self._span(module, tp.degree)
        set_own(module, self.heads, max(1, heads // tp.degree))
        set_own(module, self.head_dim, head_dim // span)
        if span > 1:
            reduce = reducer(tp, self.wire, span)
            for name in self.summed:
                module._parameters[name] = summed_product(module.get_parameter(name), reduce)

    def reduction(self, module: nn.Module, degree: int) -> Reduction | None:
        span = self._span(module, degree)
        splits = self.splits(module)
        wholes = {name: module.get_parameter(name).shape for name in self.summed}
        width = sum(shape.numel() // (shape[0] * shape[splits[name].dim]) for name, shape in wholes.items())
        return Reduction("all-reduce", width, span) if span > 1 else None

    def _span(self, module: nn.Module, degree: int) -> int:
        """Ranks that share a head."""
        return max(1, degree // int(find(module, self.heads)))


@dataclass(frozen=True)
class PaddedVocabEmbedding(ForeignStyle, VocabParallelEmbedding):
    """`VocabParallelEmbedding` for tokens of any shape, filling its rows up to a multiple of the degree."""

    def splits(self, module: nn.Module) -> dict[str, Along]:
        return {"weight": PaddedRows(0)}

    def install(self, module: nn.Module, tp: TensorParallel) -> None:
        super().install(module, tp)
        lookup = module.forward
        module.forward = lambda tokens: lookup(tokens.flatten()).unflatten(0, tokens.shape)


@dataclass(frozen=True)
class PaddedVocabHead(ForeignStyle, VocabParallelHead):
    """`VocabParallelHead` for inputs (..., d_model), filling its rows up to a multiple of the degree."""

    def splits(self, module: nn.Module) -> dict[str, Along]:
        held = [name for name in ("weight", "bias") if module._parameters.get(name) is not None]
        return dict.fromkeys(held, PaddedRows(0))

    def install(self, module: nn.Module, tp: TensorParallel) -> None:
        vocabulary = module.out_features

        def gather(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            whole = tp_all_gather(output.flatten(0, -2), tp.group, tp.degree)
            return whole[:, :vocabulary].unflatten(0, output.shape[:-1])

        module.register_forward_hook(gather)


def _length(parameter: nn.Parameter | None, split: Along) -> int | None:
    """Entries of the dimension that is split; None where the parameter does not fit, as others will say."""
    if parameter is None or parameter.dim() <= split.dim:
        return None
    try:
        return split.true(parameter.data.to("meta"), 1).shape[split.true_dim]
    except UserError:
        return None
