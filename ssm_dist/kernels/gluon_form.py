"""Forms of the selective scan on Hopper, and which one is taken."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """How a scan is run."""

    chunk: int = 0
    """Tokens of a chunk, a multiple of 16; 0 for whole sequences."""
    warps: int = 4
    """Warps a program; they share nothing but what the caches keep of B and C."""
    depth: int = 2
    """Loads into registers run this many groups of eight tokens ahead."""
    extra: int = 1
    """Of every 16 exponentials, those by polynomial."""
    stages: int = 0
    """Tiles of eight tokens in shared memory, 4 or more, for one warp a program; 0: loads into registers."""
    registers: int | None = None
    """Most registers a thread, which also makes the compiler use so many."""


STREAMED = True
"""Whether inputs that can be read 16 bytes at a time are."""
SCHEDULERS = 528
"""132 multiprocessors with four each, and a special-function unit to each scheduler."""
LATENCY, SHARE = 60, 65
"""Cycles a token, and for each warp of a scheduler's, by a model of the machine code for 1 to 5 warps."""
SUMMARY = 0.87
"""Of a token's cycles, without output."""
START = 4000
"""Cycles until a program is under way: states, the first loads, summaries to fold."""
ENOUGH, SHORTEST = 3800, 160
"""Warps in all chunks, and tokens of the shortest chunk, where loads go into registers."""


def _cycles(tokens: float, warps: int, held: int) -> float:
    """For so many tokens of each warp, where a scheduler holds at most `held` warps at a time."""
    waves, rest = divmod(warps, held * SCHEDULERS)
    last = -(-rest // SCHEDULERS)
    return waves * (START + tokens * (LATENCY + SHARE * held)) + (
        START + tokens * (LATENCY + SHARE * last) if rest else 0
    )


@functools.lru_cache(maxsize=4096)
def choose(tokens: int, sequences: int, channels: int, streams: bool) -> Form:
    """The form for sequences of about equal lengths; streams: as of `gluon_scan`."""
    length, warps = -(-tokens // sequences), sequences * -(-channels // 16)
    if not (streams and STREAMED):
        chunks = min(ENOUGH // warps, length // SHORTEST)
        return Form(16 * -(-length // (16 * chunks))) if chunks >= 3 else Form()
    best, form = _cycles(length, warps, 5), Form(0, 1, 1, 1, 4, 96)
    for chunks in range(3, min(length // 64, 128) + 1):
        chunk = 16 * -(-length // (16 * chunks))
        cost = _cycles(SUMMARY * chunk, (chunks - 1) * warps, 4) + _cycles(chunk, chunks * warps, 4)
        if cost < best:
            best, form = cost, Form(chunk, 1, 1, 1, 4, 128)
    return form
