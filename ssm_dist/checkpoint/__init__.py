"""Checkpoints: Hugging Face folders, read by slices and written from shards."""

from ssm_dist.checkpoint.folder import Checkpoint, open_checkpoint
from ssm_dist.checkpoint.load import load_parameters, resolve_dtype
from ssm_dist.checkpoint.random_weights import random_parameters
from ssm_dist.checkpoint.save import save_huggingface
from ssm_dist.checkpoint.weights import WeightMap

__all__ = [
    "Checkpoint",
    "WeightMap",
    "load_parameters",
    "open_checkpoint",
    "random_parameters",
    "resolve_dtype",
    "save_huggingface",
]
