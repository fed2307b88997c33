"""Fixtures of the kernels' tests."""

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

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
