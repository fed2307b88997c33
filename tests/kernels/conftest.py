"""Fixtures of the kernels' tests."""

from collections.abc import Iterator

import pytest

from ssm_dist.kernels import backend


@pytest.fixture
def reference_backend() -> Iterator[None]:
    """The definitions in plain torch, whatever `auto` would choose."""
    with backend.using("reference"):
        yield
