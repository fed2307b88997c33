"""Falcon-Mamba: as Mamba. Its normalisation of dt, B and C follows x_proj's reduction, as it must."""

from ssm_dist.parallel.plans.mamba import MAMBA_PLAN

FALCON_MAMBA_PLAN = MAMBA_PLAN
