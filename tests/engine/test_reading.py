"""The progress of long prompts: what is counted, and who sees it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from ssm_dist import SamplingParams
from ssm_dist.commands.generate import Reading
from ssm_dist.requests import Request
from tests.engine.checkpoints import save_checkpoint
from tests.engine.on_ranks import load

PARAMS = SamplingParams(max_new_tokens=2, ignore_eos=True)


def test_every_chunk_is_told_in_order_and_a_known_prefix_counts_as_read(tmp_path: Path):
    llm = load(save_checkpoint("mamba", tmp_path), prefix_device_bytes=10**6, prefix_interval=8)
    told: list[tuple[int, int]] = []
    prompt = [i % 90 for i in range(37)]
    for _ in range(2):
        list(llm.run(llm.prepare([prompt], [PARAMS]), lambda index, tokens: told.append((index, tokens))))
    assert told == [(0, 8), (0, 16), (0, 24), (0, 32), (0, 37), (0, 37)]


def shown(prompt_tokens: int, *, terminal: bool) -> str:
    """What is written while two prompts are read, in chunks of 10 tokens."""
    requests = [Request(i, None, [1] * prompt_tokens, PARAMS) for i in range(2)]
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, force_interactive=terminal, width=100)
    with Reading(requests, 10, console) as reading:
        for index in range(2):
            for tokens in range(10, prompt_tokens + 1, 10):
                reading.add(index, tokens)
        reading.end()
        reading.add(0, prompt_tokens)
    return out.getvalue()


def test_a_terminal_shows_how_much_has_been_read_and_then_nothing():
    text = shown(30, terminal=True)
    assert "Reading prompts" in text and "60/60" in text
    assert text.endswith("\x1b[2K"), "the line is wiped out"


@pytest.mark.parametrize(("tokens", "terminal"), [(30, False), (20, True)], ids=["a pipe", "short prompts"])
def test_nothing_is_written_where_nobody_needs_it(tokens: int, terminal: bool):
    assert shown(tokens, terminal=terminal) == ""
