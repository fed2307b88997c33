"""The examples run under torchrun as their first lines say, and print what they promise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(name: str, *launcher: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *launcher, f"examples/{name}.py"], cwd=ROOT, capture_output=True, text=True,
        timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def run(name: str) -> str:
    done = start(name, *TORCHRUN)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_without_torchrun_an_example_says_how_it_is_started() -> None:
    done = start("own_model")
    said = done.stderr.splitlines()[-1]
    assert done.returncode != 0
    assert "1 process" in said and "torchrun --standalone --nproc-per-node 2 examples/own_model.py" in said


def test_a_model_of_ones_own_under_a_short_plan() -> None:
    said = run("own_model")
    assert "the mixer's channels on each: 20" in said
    assert float(said.split("whole model:")[1].split()[0]) < 1e-5


def test_the_plan_of_the_own_model_has_15_lines() -> None:
    source = (ROOT / "examples" / "own_model.py").read_text()
    plan = source[source.index("PLAN: Plan") :]
    assert plan[: plan.index("\n}") + 2].count("\n") < 15


@pytest.mark.slow
def test_transformers_mamba_writes_what_it_writes_in_one_process() -> None:
    said = run("transformers_mamba")
    assert "as in one process: True" in said
    assert "20160 of 40140 parameters on each of 2 ranks" in said


@pytest.mark.slow
def test_a_reduction_of_ones_own_in_a_llama() -> None:
    said = run("own_reductions")
    exact, eight_bits = (float(line.split(": ")[1].split()[0]) for line in said.splitlines() if "off" in line)
    assert exact < 1e-5 < eight_bits < 0.03
