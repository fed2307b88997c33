"""What the ranks of these tests run; no slow imports here, since every worker makes them."""

from __future__ import annotations

from pathlib import Path

from ssm_dist import LLM, SamplingParams
from ssm_dist.session import Session

PROMPTS = ["def", "import os", "x", "for i in range(3):", "class A:"]
PARAMS = [
    SamplingParams(max_new_tokens=6 + 2 * i, temperature=0.5 * (i % 2), seed=i, ignore_eos=True)
    for i in range(5)
]
ENDLESS = SamplingParams(max_new_tokens=400, ignore_eos=True)


def load(folder: Path, **cache: object) -> LLM:
    settings = {"max_sequences": 3, "max_tokens": 512} | cache
    return LLM.from_pretrained(folder, cache=settings, prefill={"chunk_tokens": 8})


def served(folder: Path) -> tuple[list[list[int]] | None, int]:
    """Answers that a session gives on rank 0, and the slots free at its end."""
    llm = load(folder)

    def main(session: Session) -> list[list[int]]:
        dropped = session.submit("a", ENDLESS)
        next(dropped)
        streams = [session.submit(p, s) for p, s in zip(PROMPTS, PARAMS, strict=True)]
        dropped.cancel()
        return [stream.result().token_ids for stream in streams]

    return llm.serve(main), llm.cache.free_slots
