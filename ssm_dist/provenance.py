"""What a report says of how it was made. Nothing here imports torch, which takes seconds."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

PLACES = ("--out", "--benchmark.folder", "--benchmark.profile")
"""Options, with a word after them, that a command is told without."""


def command(program: str, words: Sequence[str]) -> str:
    """What was called, torchrun included, without where it wrote: that is a matter of the machine."""
    kept = [
        w for before, w in zip(["", *words], words, strict=False) if before not in PLACES and w not in PLACES
    ]
    return " ".join([*_started_by(), program, *kept])


def _started_by() -> list[str]:
    """torchrun and how many ranks it started, as it tells them; nothing for one, or for other launchers."""
    ranks, here = (int(os.environ.get(name, "0")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if ranks < 2 or not here:
        return []
    hosts = ["--standalone"] if ranks == here else [f"--nnodes {ranks // here}"]
    return ["torchrun", *hosts, f"--nproc-per-node {here}"]


def commit() -> str | None:
    """What the environment variable SSM_DIST_COMMIT says, for copies; else the commit of the repository.

    With -dirty where files differ from it; None outside of this package's own repository.
    """
    told = os.environ.get("SSM_DIST_COMMIT")
    if told:
        return told
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], check=True, capture_output=True)
        done = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
