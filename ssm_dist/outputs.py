"""Where results go: places that are checked before the work, and records that are written after it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ssm_dist.errors import UserError
from ssm_dist.generation import Completion


def check_file(path: Path, what: str) -> None:
    """Raise `UserError` where no file can be written at `path`; folders are not made for it.

    what: what the message begins with, such as the key that names the file.
    """
    folder = path.parent
    if os.path.isdir(path):
        raise UserError(f"{what}: {path} is a folder; name a file")
    if not os.path.isdir(folder):
        raise UserError(f"{what}: there is no folder {folder}")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
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


def write_completions(path: Path, completions: Iterable[Completion]) -> None:
    """One JSON object a line, in the order of the prompts."""
    with path.open("w", encoding="utf-8") as file:
        for completion in completions:
            file.write(json.dumps(_record(completion), ensure_ascii=False) + "\n")


def _record(completion: Completion) -> dict[str, Any]:
    record: dict[str, Any] = {"index": completion.index}
    if completion.error is not None:
        return record | {"error": completion.error}
    if completion.prompt is None:
        record["prompt_token_ids"] = completion.prompt_token_ids
    else:
        record["prompt"] = completion.prompt
    record |= {
        "token_ids": completion.token_ids,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "seconds_to_first_token": completion.seconds_to_first_token,
        "seconds": completion.seconds,
    }
    if completion.logprobs:
        record |= {"logprobs": completion.logprobs, "top_logprobs": completion.top_logprobs}
    return record
