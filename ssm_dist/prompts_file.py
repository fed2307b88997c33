"""Prompts files: JSONL, a prompt a line, with any generation option beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ssm_dist.errors import UserError, nearest
from ssm_dist.requests import Prompt
from ssm_dist.sampling.params import SamplingParams

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")


def parse_line(line: str, base: SamplingParams) -> tuple[Prompt, SamplingParams]:
    """One line of a prompts file: its prompt, and `base` with the line's own options over it.

    Raises `UserError` that says what is wrong with the line.
    """
    record = _read_json(line)
    if not isinstance(record, dict):
        raise UserError('not a JSON object; write {"prompt": "..."} or {"prompt_token_ids": [...]}')
    given = [key for key in PROMPT_KEYS if key in record]
    if len(given) != 1:
        raise UserError(f"give exactly one of {', '.join(PROMPT_KEYS)}; this line has {given or 'none'}")
    value = record.pop(given[0])
    if given[0] == "prompt" and not isinstance(value, str):
        raise UserError("prompt must be a string; use prompt_token_ids for token ids")
    if given[0] != "prompt" and not isinstance(value, list):
        raise UserError(f"{given[0]} must be a list")
    return ({"messages": value} if given[0] == "messages" else value), _override(base, record)


def read_lines(path: Path) -> list[str]:
    """The lines of a prompts file that are not blank. Raises `UserError` when there are none to read."""
    return list(_numbered_lines(path).values())


def read_prompts(path: Path, base: SamplingParams) -> list[tuple[Prompt, SamplingParams]]:
    """What `parse_line` gives of each line of a file all of whose lines are needed.

    Raises `UserError`, with the file and the number of the line, for the first line that is wrong.
    """
    parsed = []
    for number, line in _numbered_lines(path).items():
        try:
            parsed.append(parse_line(line, base))
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    return parsed


def _numbered_lines(path: Path) -> dict[int, str]:
    """By their numbers, from 1 on, the lines that are not blank."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"[generation] prompts_file: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"[generation] prompts_file: {path} is not UTF-8: {error}") from None
    # splitlines would split strings too, at the separators that JSON allows in them
    lines = {number: line for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    if not lines:
        raise UserError(f"[generation] prompts_file: {path} has no prompts")
    return lines


def _read_json(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error.msg}: column {error.colno}") from None
    except RecursionError:
        raise UserError("its lists and objects are nested too deeply to be read") from None
    except ValueError:  # beyond sys.get_int_max_str_digits()
        raise UserError("it has a number of too many digits to be read") from None


def _override(base: SamplingParams, options: dict[str, Any]) -> SamplingParams:
    known = dict(SamplingParams.of(base))
    try:
        return SamplingParams.model_validate(known | options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name, problem = ".".join(map(str, first["loc"])), first["msg"]
        if first["type"] == "extra_forbidden":
            problem = f"there is no such key; the nearest valid one is {nearest(name, known)}"
        raise UserError(f"{name}: {problem}") from None
