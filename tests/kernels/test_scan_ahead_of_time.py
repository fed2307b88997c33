"""The scans compile for real GPUs where there is none, and keep everything in registers."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

REGISTERS = {
    "plain": 104,
    "plain summary": 80,
    "plain chunk": 104,
    "plain sm_80": 104,
    "plain 32 states": 176,
    "gluon": 96,
    "gluon two ahead": 112,
    "gluon no polynomial": 104,
    "gluon first pass": 136,
    "gluon second pass": 136,
    "gluon 32 states": 152,
    "gluon 64 states": 200,
}
"""Most registers a thread; 96 leaves room for all of 8 x 5120 channels at once on 132 multiprocessors."""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_scans_compile_for_gpus_without_spills() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.kernels.scan_ahead_of_time"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    found = json.loads(output.splitlines()[-1])
    assert found.keys() == REGISTERS.keys()
    above = {name: row["registers"] for name, row in found.items() if row["registers"] > REGISTERS[name]}
    spilled = {name: row["stack"] for name, row in found.items() if row["stack"]}
    assert (above, spilled) == ({}, {})
