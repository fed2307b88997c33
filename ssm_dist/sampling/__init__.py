"""Choosing the next token: parameters of a request, noise, and the sampler of a batch of slots."""

from ssm_dist.sampling.params import SamplingParams

__all__ = ["SamplingParams"]
