"""The kernels over shared memory, whose assembly no interpreter takes, compile for a real GPU."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

MOST_STACK = 48
"""Bytes a thread: addresses of the ranks, which loops over chunks do not change."""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_they_compile_and_as_many_fit_on_a_multiprocessor_as_wait_for_each_other() -> None:
    command = [sys.executable, "-m", "tests.kernels.reductions_ahead_of_time"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    found = {row["kernel"]: row for row in map(json.loads, output.splitlines())}
    products = [row for name, row in found.items() if name.startswith("push product")]
    assert all(row["stores"] == row["words"] for row in products), "threads push copies of words"
    assert len(found) - len(products) == 17 and len(products) > 10
    assert all(row["stack"] <= MOST_STACK for row in found.values()), found
    bulk = [row for name, row in found.items() if name.startswith("bulk")]
    assert all(row["registers"] <= row["most"] for row in bulk), bulk
