"""Choosing the next token: parameters of a request, noise, and the sampler of a batch of slots."""

from ssm_dist.sampling.params import SamplingParams
from ssm_dist.sampling.sampler import Sampled, Sampler, Work

__all__ = ["Sampled", "Sampler", "SamplingParams", "Work"]
