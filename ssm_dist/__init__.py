"""Tensor-parallel inference for selective state-space language models.

    from ssm_dist import LLM, SamplingParams

The names are imported on first use, so that the command line can answer `--help` without importing torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ssm_dist.version import __version__

if TYPE_CHECKING:
    from ssm_dist.async_llm import AsyncLLM
    from ssm_dist.config import Config
    from ssm_dist.errors import UserError
    from ssm_dist.generation import Completion, TokenEvent
    from ssm_dist.llm import LLM
    from ssm_dist.sampling.params import SamplingParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "Completion",
    "Config",
    "SamplingParams",
    "TokenEvent",
    "UserError",
    "__version__",
]

_HOMES = {
    "AsyncLLM": "ssm_dist.async_llm",
    "LLM": "ssm_dist.llm",
    "Completion": "ssm_dist.generation",
    "Config": "ssm_dist.config",
    "SamplingParams": "ssm_dist.sampling.params",
    "TokenEvent": "ssm_dist.generation",
    "UserError": "ssm_dist.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
