"""Chunked prefill: the longest prompt needs as much activation memory as one that fills two chunks."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssm_dist import LLM, SamplingParams
from tests.engine.checkpoints import save_checkpoint
from tests.live_bytes import LiveBytes


def peaks(name: str, folder: Path, chunk: int, lengths: list[int]) -> list[int]:
    """The most bytes of tensors alive at a time while a prompt of each length is answered."""
    llm = LLM.from_pretrained(
        save_checkpoint(name, folder), cache={"max_sequences": 1}, prefill={"chunk_tokens": chunk}
    )
    found = []
    for length in lengths:
        with LiveBytes() as count:
            llm.generate([[i % 90 for i in range(length)]], SamplingParams(max_new_tokens=2, ignore_eos=True))
        assert count.live == 0, "something is left of the prompt"
        found.append(count.peak)
    return found


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba"])
def test_a_longer_prompt_needs_no_more_memory(name: str, tmp_path: Path) -> None:
    one, two, more, odd = peaks(name, tmp_path, 64, [64, 2 * 64, 16 * 64, 16 * 64 + 37])
    assert one <= two == more == odd


@pytest.mark.slow
def test_128_k_tokens_need_no_more_memory_than_16_k(tmp_path: Path) -> None:
    short, long = peaks("mamba", tmp_path, 8192, [16 * 1024, 128 * 1024])
    assert long == short
