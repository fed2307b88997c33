"""Trying a plan: a small model whole and sharded must compute the same, or the plan is wrong.

Shapes cannot tell a packed weight's blocks from its pairs of rows, or heads from parts of them: numbers can.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssm_dist.errors import UserError
from ssm_dist.parallel.foreign import shard_module
from ssm_dist.parallel.mesh import TensorParallel
from ssm_dist.parallel.plan import Plan, ResolvedPlan, require_degree
from ssm_dist.parallel.simulated import on_simulated_ranks
from ssm_dist.parallel.styles import Rowwise

Run = Callable[[nn.Module], Tensor]
Trace = dict[str, Tensor]
"""Outputs by module path, in the order in which the modules first ended."""

DECODED = 4
"""Tokens that `run_on_tokens` lets transformers' models generate."""


def check_plan(
    factory: Callable[[], nn.Module],
    plan: Plan | None = None,
    degree: int = 2,
    run: Run | None = None,
    tolerance: float = 1e-4,
) -> None:
    """Raise `UserError` unless the model computes the same sharded, naming the first module that does not.

    factory: builds the model on the CPU, with few layers and small sizes that the degree divides. Parameters
    are made random here. plan: by default that of its class. run: calls the model; default `run_on_tokens`.
    tolerance: of the greatest difference, relative to the greatest value where that is above 1. The ranks are
    threads: no process group is needed, and none is touched.
    """
    require_degree(degree)
    run = run_on_tokens if run is None else run
    with torch.random.fork_rng(devices=[]):
        whole = factory().eval()
    _randomise(whole)
    shards = [copy.deepcopy(whole) for _ in range(degree)]
    with torch.inference_mode():
        trace = _traced(whole)
        expected = _run_whole(whole, run)
    for rank, (output, own, resolved) in enumerate(_run_sharded(shards, plan, run)):
        if _differs(output, expected, tolerance):
            where = _first_difference(trace, own, resolved, tolerance)
            raise UserError(f"rank {rank} of {degree} {_by_how_much(output, expected)}. {where}")


def _run_whole(model: nn.Module, run: Run) -> Tensor:
    try:
        return run(model)
    except Exception as error:
        raise UserError(
            f"the model does not run whole, before any plan: {_said(error)}; pass run=..., a function that "
            "calls it as you do"
        ) from error


def _run_sharded(
    models: Sequence[nn.Module], plan: Plan | None, run: Run
) -> list[tuple[Tensor, Trace, ResolvedPlan]]:
    """Shard one copy of the model a rank, and run them all."""

    def on_rank(tp: TensorParallel) -> tuple[Tensor, Trace, ResolvedPlan]:
        resolved = shard_module(models[tp.rank], tp, plan, torch.device("cpu"))
        own = _traced(models[tp.rank])
        return run(models[tp.rank]), own, resolved

    try:
        return on_simulated_ranks(len(models), on_rank)
    except UserError:
        raise
    except Exception as error:
        said = f"the model does not run when sharded over {len(models)} ranks: {_said(error)}"
        raise UserError(said) from error


def _said(error: Exception) -> str:
    """What an error says, with its type, without which many say little or nothing; ours say all."""
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def run_on_tokens(model: nn.Module) -> Tensor:
    """Logits of a language model for two sequences, and for what transformers' generate adds to them.

    Raises `UserError` for a model without an embedding.
    """
    embedding = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    if embedding is None:
        raise UserError("it has no nn.Embedding to draw tokens for")
    tokens = (torch.arange(18).view(2, 9) * 7 + 1) % embedding.num_embeddings
    output = model(tokens)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    if not hasattr(model, "generation_config"):
        return logits
    decoded: Any = model.generate(  # type: ignore[operator]
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=DECODED,
        min_new_tokens=DECODED, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return torch.cat([logits, torch.stack(decoded.logits, dim=1)], dim=1)


def _randomise(model: nn.Module) -> None:
    """Norms, biases and D are initialised to constants, which would hide that they are misplaced."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.add_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)


def _traced(model: nn.Module) -> Trace:
    """A trace that fills as the model runs."""
    trace: Trace = {}

    def watch(path: str, module: nn.Module) -> None:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, Sequence) and output else output
            if isinstance(tensor, Tensor) and path not in trace:
                trace[path] = tensor.clone()

        module.register_forward_hook(keep)

    for path, module in model.named_modules():
        watch(path, module)
    return trace


def _first_difference(whole: Trace, own: Trace, resolved: ResolvedPlan, tolerance: float) -> str:
    """Which module is the first to end differently, and what ran since the last that ended alike."""
    partial = [path for path, style in resolved.styles.items() if isinstance(style, Rowwise)]
    agreed, since = "the input", list[str]()
    for path, expected in whole.items():
        found = own.get(path)
        comparable = found is not None and found.shape == expected.shape
        if not comparable or any(f"{other}.".startswith(f"{path}.") for other in partial):
            since += [path] if path in resolved.styles else []
        elif found is not None and _differs(found, expected, tolerance):
            between = f" Between them ran {', '.join(since)}." if since else ""
            return (
                f"The first output that differs is that of {path or 'the model'}; the last that agrees is "
                f"that of {agreed}.{between} Look at how the parameters there are split: packed weights in "
                "blocks or in pairs, whole heads, sums that nobody reduces"
            )
        else:
            agreed, since = path, []
    return "No single module's output shows where."


def _differs(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    if found.shape != expected.shape:
        return True
    close: bool = bool((found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max())))
    return not close


def _by_how_much(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape:
        return f"returns the shape {tuple(found.shape)}, and the whole model {tuple(expected.shape)}"
    return (
        f"differs from the whole model by {float((found - expected).abs().max()):.3g}, "
        f"where values reach {float(expected.abs().max()):.3g}"
    )
