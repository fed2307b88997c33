"""Ready plans, one file a model."""

from ssm_dist.parallel.plans.falcon_mamba import FALCON_MAMBA_PLAN
from ssm_dist.parallel.plans.mamba import MAMBA_PLAN
from ssm_dist.parallel.plans.zamba import ZAMBA_PLAN

__all__ = ["FALCON_MAMBA_PLAN", "MAMBA_PLAN", "ZAMBA_PLAN"]
