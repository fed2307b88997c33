"""The command line under torchrun: one message from one rank, an exit code, and no hang."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssm_dist.errors import UserError
from ssm_dist.ranks import init_ranks

ROOT = Path(__file__).parents[1]

PROGRAM = """
import sys, time, types
import torch.distributed as dist
from ssm_dist import cli
from ssm_dist.errors import UserError
from ssm_dist.ranks import init_ranks

def run(config):
    ranks = init_ranks(config.parallel.tensor, "cpu")
{body}

sys.modules["ssm_dist.commands.generate"] = command = types.ModuleType("generate")
command.run = run
sys.exit(cli.main())
"""


@pytest.fixture
def torchrun(tmp_path):
    """Runs a command with this body on two ranks, within two minutes; returns the finished process."""

    def start(body, *words, command="generate", model="a"):
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        (tmp_path / "program.py").write_text(PROGRAM.format(body=lines))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return subprocess.run(
            [*launcher, tmp_path / "program.py", command, "--model.preset", model, *words],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return start


def test_a_bad_configuration_is_reported_once(torchrun):
    done = torchrun("pass", "--cache.max_sequences", "0")
    assert done.returncode != 0
    assert done.stderr.count("error: command line: cache.max_sequences = 0") == 1


def test_an_unknown_flag_is_reported_once(torchrun):
    done = torchrun("pass", "--parallel.tensr", "2")
    assert done.returncode != 0 and done.stderr.count("--parallel.tensr") == 1


def test_help_is_printed_once(torchrun):
    done = torchrun("pass", "--help")
    assert done.returncode == 0 and done.stdout.count("usage:") == 1


def test_a_command_without_ranks_runs_once(torchrun):
    done = torchrun("pass", command="plan", model="mamba-tiny")
    assert done.returncode == 0 and done.stdout.count("weights a rank") == 1, done.stderr
    done = torchrun("pass", command="report")
    assert done.returncode != 0 and done.stderr.count("ssm-dist report: error") == 1


def test_a_wrong_world_size_names_both_numbers_and_the_command_to_use(torchrun):
    done = torchrun("pass", "--parallel.tensor", "4")
    assert done.returncode != 0 and done.stderr.count("error: [parallel] tensor is 4") == 1
    assert "torchrun started 2" in done.stderr and "--nproc-per-node 4" in done.stderr


def test_ranks_that_agree_end_well(torchrun):
    # one write a line: the ranks share the pipe
    body = "dist.barrier()\nsys.stdout.write(f'rank {ranks.rank} of {ranks.world}\\n')"
    done = torchrun(body, "--parallel.tensor", "2")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "rank 0 of 2", "rank 1 of 2"]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_alone_speaks_and_ends_the_others(torchrun, failing):
    body = f"if ranks.rank == {failing}:\n    raise UserError('only here')\ndist.barrier()"
    done = torchrun(body, "--parallel.tensor", "2")
    assert done.returncode != 0
    assert (
        done.stderr.count("error: only here") == 1
        and "Traceback (most recent call last):\n" not in (done.stderr.split("error: only here")[0])
    )


def test_ranks_that_fail_one_after_the_other_speak_once(torchrun):
    body = "time.sleep(ranks.rank)\nraise UserError(f'rank {ranks.rank} is unhappy')"
    done = torchrun(body, "--parallel.tensor", "2")
    assert done.returncode != 0 and done.stderr.count("is unhappy") == 1


def test_an_unexpected_error_shows_one_traceback(torchrun):
    done = torchrun("raise KeyError('lost')", "--parallel.tensor", "2")
    assert done.returncode != 0 and done.stderr.count("KeyError: 'lost'") == 1


def test_a_single_process_asked_for_ranks_is_told_how_to_start_them(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=r"1 process .*torchrun --standalone --nproc-per-node 2"):
        init_ranks(2, "cpu")


def test_a_single_process_needs_no_process_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    ranks = init_ranks(1, "cpu")
    assert (ranks.rank, ranks.world, ranks.device.type) == (0, 1, "cpu")
