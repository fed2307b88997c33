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


ENOUGH = 3800
"""Warps in all chunks: 1.8 times what 132 multiprocessors hold, so that the last ones to end are few."""
SHORTEST = 160
"""Tokens under which a chunk costs more in folding states than it gains."""


@functools.lru_cache(maxsize=4096)
def choose(tokens: int, sequences: int, channels: int) -> Form:
    """The form for sequences of about equal lengths.

    The constants are from measurements of 1 x 2048 to 8 x 8192 tokens of 1280 to 8192 channels on an H100.
    """
    length, warps = -(-tokens // sequences), sequences * -(-channels // 16)
    chunks = min(ENOUGH // warps, length // SHORTEST)
    return Form(16 * -(-length // (16 * chunks))) if chunks >= 3 else Form()
