"""The plan of a class, found by its name: nothing is imported for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ssm_dist.errors import UserError
from ssm_dist.parallel.plan import Plan
from ssm_dist.parallel.plans.mamba_ssm import MAMBA_SSM_MLP, MAMBA_SSM_PLAN
from ssm_dist.parallel.plans.transformers_jamba import (
    JAMBA_ATTENTION,
    JAMBA_EXPERTS,
    JAMBA_MLP,
    TRANSFORMERS_JAMBA_PLAN,
)
from ssm_dist.parallel.plans.transformers_mamba import TRANSFORMERS_MAMBA_PLAN
from ssm_dist.parallel.plans.transformers_zamba import TRANSFORMERS_ZAMBA_PLAN


@dataclass(frozen=True)
class ReadyPlan:
    """A plan, and parts that some sizes of the model lack as a whole."""

    plan: Plan
    optional: Sequence[Plan] = ()


READY: dict[tuple[str, str], ReadyPlan] = {
    ("transformers", "MambaForCausalLM"): ReadyPlan(TRANSFORMERS_MAMBA_PLAN),
    ("transformers", "FalconMambaForCausalLM"): ReadyPlan(TRANSFORMERS_MAMBA_PLAN),
    ("transformers", "ZambaForCausalLM"): ReadyPlan(TRANSFORMERS_ZAMBA_PLAN),
    ("transformers", "JambaForCausalLM"): ReadyPlan(
        TRANSFORMERS_JAMBA_PLAN, (JAMBA_ATTENTION, JAMBA_MLP, JAMBA_EXPERTS)
    ),
    ("mamba_ssm", "MambaLMHeadModel"): ReadyPlan(MAMBA_SSM_PLAN, (MAMBA_SSM_MLP,)),
}
"""By package and class."""


def plan_for(model: nn.Module) -> Plan:
    """The ready plan of a model's class, or of one that it derives from. Raises `UserError` if none."""
    for cls in type(model).__mro__:
        ready = READY.get((cls.__module__.partition(".")[0], cls.__name__))
        if ready is not None:
            present = [part for part in ready.optional if _is_in(model, part)]
            return ready.plan | {pattern: style for part in present for pattern, style in part.items()}
    known = ", ".join(".".join(key) for key in READY)
    cls = type(model)
    raise UserError(
        f"there is no ready plan for {cls.__module__}.{cls.__name__}, only for {known}; write one "
        "and pass it (docs/writing_a_plan.md)"
    )


def _is_in(model: nn.Module, part: Plan) -> bool:
    """Whether any pattern of a plan's part matches a module."""
    patterns = [re.compile(re.escape(pattern).replace(r"\*", "[^.]+")) for pattern in part]
    return any(pattern.fullmatch(path) for path, _ in model.named_modules() for pattern in patterns)
