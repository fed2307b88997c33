"""Checkpoints of the oracle's models, written once a session."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.oracle import random_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By name of `oracle.SIZES`: the folder that save_pretrained wrote."""
    parent = tmp_path_factory.mktemp("checkpoints")

    def folder(name: str) -> Path:
        if not (parent / name).exists():
            random_model(name).save_pretrained(parent / name)
        return parent / name

    return folder
