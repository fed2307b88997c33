"""The command line in one process: what it prints, and its exit codes."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

from ssm_dist import cli
from ssm_dist.errors import UserError
from ssm_dist.parallel.collectives import RankFailure
from ssm_dist.version import __version__

ROOT = Path(__file__).parents[1]
PRESET = ["--model.preset", "a"]


@pytest.fixture
def command(monkeypatch):
    """Puts a function in the place of a subcommand."""
    monkeypatch.delenv("RANK", raising=False)

    def replace(run, name="generate"):
        module = types.ModuleType(f"ssm_dist.commands.{name}")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return replace


def raising(error):
    def run(config):
        raise error

    return run


def test_no_command_is_generate(command):
    seen = []
    command(seen.append)
    assert cli.main([*PRESET, "--generation.seed", "3"]) == 0
    assert cli.main(["generate", *PRESET, "--generation.seed", "4"]) == 0
    assert [config.generation.seed for config in seen] == [3, 4]


@pytest.mark.parametrize("name", ["plan", "score"])
def test_the_first_word_names_a_command(command, name):
    seen = []
    command(seen.append, name)
    assert cli.main([name, *PRESET]) == 0 and len(seen) == 1


def test_config_names_the_toml_file(command, tmp_path):
    (tmp_path / "job.toml").write_text('[model]\npreset = "from the file"')
    seen = []
    command(seen.append)
    assert cli.main(["--config", str(tmp_path / "job.toml")]) == 0
    assert seen[0].model.preset == "from the file"


def test_an_unknown_command_is_answered_with_the_nearest(capsys):
    assert cli.main(["plna"]) == 1
    assert capsys.readouterr().err.startswith("error: there is no command plna; the nearest is plan")


def test_a_users_mistake_is_one_message_without_a_traceback(command, capsys):
    command(raising(UserError("the sky is too low")))
    assert cli.main(PRESET) == 1
    assert capsys.readouterr() == ("", "error: the sky is too low\n")


def test_an_unexpected_error_keeps_its_traceback(command, capsys):
    command(raising(KeyError("lost")))
    assert cli.main(PRESET) == 1
    assert "Traceback" in (printed := capsys.readouterr().err) and "KeyError: 'lost'" in printed


def test_a_reduction_that_others_did_not_come_to_is_one_message(command, capsys):
    def run(config):
        try:
            raise RuntimeError("the wait that was given up")
        except RuntimeError as error:
            raise RankFailure("missing: rank 1 of 2") from error

    command(run)
    assert cli.main(PRESET) == 1
    assert capsys.readouterr() == ("", "error: missing: rank 1 of 2\n")


def test_an_interrupt_is_quiet(command, capsys):
    command(raising(KeyboardInterrupt()))
    assert cli.main(PRESET) == 130
    assert capsys.readouterr() == ("", "")


def test_help_lists_commands_and_every_section(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    words = ["plan", "score", "--config", "--parallel.tensor", "--output.file", '"messages"']
    assert all(word in printed for word in words)


def test_version_is_the_packages(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ssm-dist {__version__}\n"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["--parallel.tensor", "x"]], ids=" ".join)
def test_answers_without_a_model_do_not_import_torch(words):
    check = f"import sys; from ssm_dist.cli import main; main({words}); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, capture_output=True, timeout=60)
