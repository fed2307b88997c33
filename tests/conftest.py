"""Fixtures of all tests."""

import os
from collections.abc import Iterator

import pytest
import torch

# Triton reads this as it is imported, which parts of torch do; its kernels' tests need the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.ranks import end_all_ranks


@pytest.fixture(scope="session", autouse=True)
def ranks_end_with_the_session() -> Iterator[None]:
    """The workers of `run_on_ranks` serve all tests of a session."""
    yield
    end_all_ranks()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, alone or in a suite."""
    torch.manual_seed(0)
