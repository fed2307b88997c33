"""Fixtures of all tests."""

from collections.abc import Iterator

import pytest
import torch

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
