"""Where kernels in Triton's Gluon dialect, which are written for Hopper, can run."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
import triton


@functools.cache
def gluon_module(name: str, device: torch.device) -> ModuleType | None:
    """A module of this package, where the GPU is a Hopper one and Triton's Gluon is that of the tests."""
    if triton.knobs.runtime.interpret or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    if not (3, 6) <= tuple(int(n) for n in triton.__version__.split(".")[:2]) <= (3, 9):
        return None
    return importlib.import_module(f"ssm_dist.kernels.{name}")
