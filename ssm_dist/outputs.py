"""Answers as a file of JSON objects."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ssm_dist.generation import Completion


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
