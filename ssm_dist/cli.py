"""The command line: `infer.py` and `ssm-dist` are this program. It runs in every rank, and one rank speaks.

Nothing here imports torch until a command runs or several ranks have to agree on who reports an error, so
that `--help` and mistakes in the configuration answer at once.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Sequence

from ssm_dist.commands import COMMANDS, speaks
from ssm_dist.config_reading import build_config
from ssm_dist.errors import RankFailure, UserError, nearest
from ssm_dist.flags import read_flags
from ssm_dist.version import __version__

INTERRUPTED = 130
BROKEN_PIPE = 141

MOST_SECONDS_TO_LEAVE = 10.0
"""A job that has done its work ends, whatever a communicator still waits for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (by default sys.argv) names; returns the exit code.

    A `UserError` is printed as one message without a traceback, as is a reduction that other ranks did not
    come to; anything else with one. One rank prints it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(words)
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # the reader has seen enough (`ssm-dist --help | head`); flushing at exit would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (UserError, RankFailure) as error:
        return _fail(f"error: {error}")
    except Exception:
        return _fail(traceback.format_exc().rstrip())


def _run(words: list[str]) -> None:
    if {"--help", "-h", "--version"} & set(words) and not speaks():
        return
    if "--version" in words:
        print(f"ssm-dist {__version__}")
        return
    name = words.pop(0) if words and not words[0].startswith("-") else "generate"
    if words and f"{name} {words[0]}" in COMMANDS:
        name = f"{name} {words.pop(0)}"
    if name not in COMMANDS:
        close = nearest(name, COMMANDS)
        raise UserError(f"there is no command {name}; the nearest is {close} (see ssm-dist --help)")
    command = COMMANDS[name]
    if command.alone and not speaks():
        return
    module, _, action = name.partition(" ")
    if command.schema is None:
        importlib.import_module(f"ssm_dist.commands.{module}").run(words)
        return
    try:
        flags = read_flags(command.schema, words, prog=f"ssm-dist {name}", description=_describe(name))
    except SystemExit:  # after --help
        return
    config = build_config(flags.pop("config", None), flags, command.schema)
    logging.basicConfig(level=logging.INFO if speaks() else logging.ERROR, format="%(message)s")
    getattr(importlib.import_module(f"ssm_dist.commands.{module}"), action or "run")(config)
    _close_ranks()


def _describe(name: str) -> str:
    commands = "\n".join(f"  {known:15}{command.summary}" for known, command in COMMANDS.items())
    return f"{COMMANDS[name].summary}\n\nCommands, given as the first word:\n{commands}"


def _close_ranks() -> None:
    """Leave the process group, if the command has joined one; a rank ends here, its work done."""
    gc.collect()  # what the job held goes first: communicators wait for steps that were captured with them
    if "ssm_dist.ranks" in sys.modules:
        leaving = threading.Thread(target=sys.modules["ssm_dist.ranks"].close_ranks, daemon=True)
        leaving.start()
        leaving.join(MOST_SECONDS_TO_LEAVE)
    if "RANK" in os.environ:
        # gloo's threads may outlive the interpreter's teardown, and would then abort a job that went well
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _fail(message: str) -> int:
    """Print `message` from one rank, and end all of them. A single process returns its exit code."""
    if "RANK" in os.environ:
        from ssm_dist.ranks import fail_together

        fail_together(message)
    print(message, file=sys.stderr)
    return 1
