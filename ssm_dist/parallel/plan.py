"""Plans: which style each module of a model takes; checked against the model before anything is touched.

A plan is a dictionary from module path patterns to styles, `*` standing for one path segment:

    PLAN = {"layers.*.mixer.in_proj": PackedColwise(), "layers.*.mixer.out_proj": Rowwise(), ...}
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from ssm_dist.errors import UserError
from ssm_dist.parallel.mesh import TensorParallel
from ssm_dist.parallel.styles import Reduction, Style

Plan = dict[str, Style]

DEGREES = range(1, 65)
"""Degrees that an error message proposes from where no split dimension bounds them."""


@dataclass(frozen=True)
class ParameterPlacement:
    """Where one parameter lives: whole on every rank, or split evenly along one dimension in rank order."""

    path: str
    shape: tuple[int, ...]
    """Over all ranks."""
    dtype: torch.dtype
    dim: int | None
    """The split dimension; None for a replicated parameter."""
    degree: int

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape on one rank."""
        return tuple(n // self.degree if d == self.dim else n for d, n in enumerate(self.shape))

    @property
    def local_bytes(self) -> int:
        """Bytes on one rank."""
        return self.dtype.itemsize * torch.Size(self.local_shape).numel()

    def slice(self, rank: int) -> slice:
        """The range of `dim` that a rank holds; everything for a replicated parameter."""
        if self.dim is None:
            return slice(None)
        length = self.shape[self.dim] // self.degree
        return slice(rank * length, (rank + 1) * length)


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan matched against one model at one degree; nothing in it refers to running ranks."""

    parameters: list[ParameterPlacement]
    styles: dict[str, Style]
    """By module path, in the model's order."""
    reductions: dict[str, Reduction]
    """By path of the module that sends."""


def resolve_plan(model: nn.Module, plan: Plan, degree: int) -> ResolvedPlan:
    """Match a plan with a model (on any device, meta included), or say everything that does not fit.

    Raises `UserError` naming values that are no styles, patterns without a match, parameters no pattern
    covers, modules covered twice, and parameters that the degree does not divide with the degrees that would
    work.
    """
    require_degree(degree)
    _require_styles(plan)
    modules = dict(model.named_modules())
    styles, problems = _match(modules, plan)
    found: dict[int, ParameterPlacement] = {}
    for path, module in modules.items():
        for name, parameter in module.named_parameters(recurse=False):
            if path not in styles:
                problems.append(f"no pattern covers parameter {_join(path, name)}")
                continue
            placement = _placement(path, name, parameter, module, styles[path], degree)
            first = found.setdefault(id(parameter), placement)
            if (first.dim, first.shape) != (placement.dim, placement.shape):
                problems.append(f"{first.path} and {placement.path} are tied but split differently")
    _raise_if_any(problems)
    _check_degree(modules, styles, degree)
    reductions = {path: styles[path].reduction(modules[path], degree) for path in styles if degree > 1}
    sent = {path: reduction for path, reduction in reductions.items() if reduction is not None}
    return ResolvedPlan(list(found.values()), styles, sent)


def require_degree(degree: int) -> None:
    """Raise `UserError` for what is no number of ranks."""
    if type(degree) is not int or degree < 1:
        raise UserError(f"degree = {degree!r}: must be an integer of at least 1")


def apply_plan(model: nn.Module, tp: TensorParallel, plan: Plan) -> ResolvedPlan:
    """Turn every parameter of a meta model into a DTensor with its planned placement, and install the styles.

    Collective: all ranks call it alike. Raises as `resolve_plan`, before the model is changed. Models that
    are loaded already, or written elsewhere, take `shard_module`.
    """
    resolved = resolve_plan(model, plan, tp.degree)
    placements = {placement.path: placement for placement in resolved.parameters}
    for path, parameter in model.named_parameters():
        if not parameter.is_meta or placements[path].shape != tuple(parameter.shape):
            raise UserError(f"{path} is allocated, or has another shape when sharded: use shard_module")
    sharded = {
        id(parameter): _as_dtensor(parameter, placements[path], tp)
        for path, parameter in model.named_parameters()
    }
    _replace_parameters(model, sharded)
    for path, style in resolved.styles.items():
        style.install(model.get_submodule(path), tp)
    return resolved


def localise(model: nn.Module) -> None:
    """Replace every DTensor parameter by its local tensor, tied ones staying one parameter.

    The placements stay in the `ResolvedPlan`: saving rebuilds the DTensors from it.
    """
    local = {
        id(parameter): nn.Parameter(parameter.data.to_local(), requires_grad=False)
        for parameter in model.parameters()
        if isinstance(parameter.data, DTensor)
    }
    _replace_parameters(model, local)


def _replace_parameters(model: nn.Module, replacement: dict[int, nn.Parameter]) -> None:
    """Put `replacement[id(p)]` in the place of every parameter p, wherever it occurs."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = replacement.get(id(parameter), parameter)


def _require_styles(plan: Plan) -> None:
    _raise_if_any([
        f"the value of pattern {pattern!r} must be a style, such as Replicated(), and is {style!r}"
        for pattern, style in plan.items()
        if not isinstance(style, Style)
    ])  # fmt: skip


def _raise_if_any(problems: list[str]) -> None:
    if problems:
        raise UserError("the plan does not fit the model:\n  " + "\n  ".join(problems))


def _match(modules: dict[str, nn.Module], plan: Plan) -> tuple[dict[str, Style], list[str]]:
    """The style of every module that a pattern names, and what went wrong."""
    styles: dict[str, Style] = {}
    problems = []
    for pattern, style in plan.items():
        expression = re.compile(re.escape(pattern).replace(r"\*", "[^.]+"))
        paths = [path for path in modules if expression.fullmatch(path)]
        if not paths:
            problems.append(f"pattern {pattern!r} matches no module")
        problems += [
            f"module {path} is covered twice, again by {pattern!r}" for path in paths if path in styles
        ]
        problems += [
            f"{pattern!r} splits {name!r}, which {path} lacks"
            for path in paths
            for name in style.shards(modules[path])
            if name not in modules[path]._parameters
        ]
        problems += [f"{path} {objection}" for path in paths for objection in style.objections(modules[path])]
        styles |= dict.fromkeys(paths, style)
    return styles, problems


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _placement(
    path: str, name: str, parameter: nn.Parameter, module: nn.Module, style: Style, degree: int
) -> ParameterPlacement:
    dim = style.shards(module).get(name)
    shape = _true_shape(path, name, module, style, degree)
    if dim is not None and dim >= len(shape):
        raise UserError(f"{_join(path, name)} has {len(shape)} dimensions, none numbered {dim}")
    return ParameterPlacement(_join(path, name), shape, parameter.dtype, dim, degree)


def _true_shape(path: str, name: str, module: nn.Module, style: Style, degree: int) -> tuple[int, ...]:
    """The shape of a module's parameter as its style splits it; see `Style.true_form`."""
    parameter = module.get_parameter(name).data.to("meta")
    try:
        return tuple(style.true_form(module, name, parameter, degree).shape)
    except UserError as error:
        raise UserError(f"the plan does not fit the model:\n  {_join(path, name)} {error}") from None


def _check_degree(modules: dict[str, nn.Module], styles: dict[str, Style], degree: int) -> None:
    """Raise with the first parameter that a degree does not divide, and the degrees that divide them all."""

    def misfit(candidate: int) -> str | None:
        for path, style in styles.items():
            module = modules[path]
            for name, dim in style.shards(module).items():
                size = _true_shape(path, name, module, style, candidate)[dim]
                if size % candidate and not (style.padded and candidate != degree):
                    return f"dimension {dim} of {_join(path, name)} has {size} entries"
            reason = style.misfit(module, candidate)
            if reason is not None:
                return f"{path} {reason}"
        return None

    reason = misfit(degree)
    if reason is None:
        return
    # every degree that works divides all sizes but the padded ones
    common = math.gcd(
        *(
            _true_shape(path, name, modules[path], style, 1)[dim]
            for path, style in styles.items()
            if not style.padded
            for name, dim in style.shards(modules[path]).items()
        )
    )
    candidates = [n for n in range(1, common + 1) if common % n == 0] or DEGREES
    fitting = ", ".join(str(n) for n in candidates if misfit(n) is None)
    which = "degrees" if common else f"degrees up to {DEGREES[-1]}"
    raise UserError(f"degree {degree} does not divide the model: {reason}; {which} that work: {fitting}")


def _as_dtensor(parameter: nn.Parameter, placement: ParameterPlacement, tp: TensorParallel) -> nn.Parameter:
    """A meta DTensor in the place of a meta parameter."""
    local = torch.empty(placement.local_shape, dtype=placement.dtype, device="meta")
    layout = Replicate() if placement.dim is None else Shard(placement.dim)
    whole = DTensor.from_local(
        local, tp.mesh, [layout], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(whole, requires_grad=False)
