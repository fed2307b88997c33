"""Places for results, checked before the work that would be lost."""

from __future__ import annotations

import os
from pathlib import Path

from ssm_dist.errors import UserError


def check_file(path: Path, what: str, *, replaced: bool = False) -> None:
    """Raise `UserError` where no file can be written at `path`; folders are not made for it.

    what: what the message begins with, such as the key that names the file. replaced: the file is written
    beside it and renamed, which needs the folder, too.
    """
    folder = path.parent
    if os.path.isdir(path):
        raise UserError(f"{what}: {path} is a folder; name a file")
    if not os.path.isdir(folder):
        raise UserError(f"{what}: there is no folder {folder}")
    written = path if os.path.exists(path) else folder
    if not os.access(written, os.W_OK) or (replaced and not os.access(folder, os.W_OK)):
        raise UserError(f"{what}: {path} may not be written")


def make_folder(path: Path, what: str) -> None:
    """Make a folder for several files, with those above it. Raises `UserError` where that cannot be done.

    what: as for `check_file`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{what}: {path} is not a folder") from None
    except OSError as error:
        raise UserError(f"{what}: cannot make the folder {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{what}: no file may be written in {path}")
