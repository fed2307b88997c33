"""Fixtures of the kernels' tests."""

import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest
import torch

# Triton reads this as it is imported, and parts of torch import it. Where another test came first, the
# fixture `triton_backend` says so.
if "triton" not in sys.modules and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from ssm_dist.kernels import backend


@pytest.fixture
def reference_backend() -> Iterator[None]:
    """The definitions in plain torch, whatever `auto` would choose."""
    with backend.using("reference"):
        yield


@pytest.fixture
def triton_backend() -> Iterator[None]:
    """The Triton kernels in the interpreter, with NaN in all fresh memory."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    assert os.environ.get("TRITON_INTERPRET") == "1", (
        "triton was imported first: set TRITON_INTERPRET=1 for this run"
    )
    torch.use_deterministic_algorithms(True)
    with backend.using("triton", "cpu"):
        yield
    torch.use_deterministic_algorithms(False)
