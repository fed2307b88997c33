"""The version of the package, in its one place (pyproject.toml reads it from here), and its commit."""

import os
import subprocess
from pathlib import Path

__version__ = "0.1.0"


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
