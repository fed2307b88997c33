"""Forms of the selective scan on Hopper, and which one is taken."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Form:
    """How a scan is run."""

    chunk: int = 0
    """Tokens of a chunk, a multiple of 8; 0 for whole sequences."""
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
    cut: int = 0
    """Tokens that the first chunk of a sequence is shorter by; not chosen before it has been measured."""
    whole: int = 0
    """Of the channels of a sequence, with chunks: those of so many programs stay whole. Not chosen either."""
    early: bool = False
    """With stages: the first tiles are copied before what else a program begins with. Not chosen either."""


def serves(x: Tensor, dt: Tensor, z: Tensor, B: Tensor, C: Tensor) -> bool:
    """Whether the kernel can take such inputs: 16-bit, 16, 32 or 64 states, and readable in pairs."""
    pairs = all(t.data_ptr() % 4 == 0 and not any(n % 2 for n in t.stride()[:-1]) for t in (x, dt, z, B, C))
    channels = x.shape[1] // B.shape[1]
    return x.element_size() == 2 and B.shape[2] in (16, 32, 64) and channels % 2 == 0 and pairs


def streams(x: Tensor, dt: Tensor, z: Tensor, B: Tensor, C: Tensor) -> bool:
    """Whether a form with stages can, too: 16 states, and readable 16 bytes at a time."""
    eights = all(t.data_ptr() % 16 == 0 and not any(n % 8 for n in t.stride()[:-1]) for t in (x, dt, z, B, C))
    return B.shape[2] == 16 and x.shape[1] // B.shape[1] % 8 == 0 and eights


STREAMED = True
"""Whether inputs that can be read 16 bytes at a time are."""
SCHEDULERS = 528
"""132 multiprocessors with four each, and a special-function unit to each scheduler."""
LATENCY, SHARE = 15, 51
"""Nanoseconds a token, and for each warp of a scheduler's: H100, whole sequences with 1, 2 and 5 warps."""
IN_CHUNKS = (72, 126, 190, 216, 268)
"""Nanoseconds a token of sequences in chunks, with at most 1, 2, ... warps a scheduler: H100."""
SUMMARY, FOLD = 0.85, 1.0
"""In tokens: one without output, and what folding a summary into a state takes."""
STARTS = 8000
"""Nanoseconds for two passes to get under way, beyond one."""
LONG, MANY = 4096, 2 * SCHEDULERS
"""Tokens, and warps, from which more tiles ahead pay for the longer start."""
ENOUGH, SHORTEST = 3800, 160
"""Warps in all chunks, and tokens of the shortest chunk, where loads go into registers."""
SHORTEST_STREAMED = 128
"""Tokens of the shortest chunk otherwise."""


def _whole(tokens: float, warps: int) -> float:
    """Nanoseconds for sequences of so many tokens; a scheduler with one warp more holds up all others."""
    return tokens * (LATENCY + SHARE * math.ceil(warps / SCHEDULERS))


def _two_passes(chunk: int, chunks: int, warps: int) -> float:
    """Nanoseconds for sequences in so many chunks; warps: of one chunk of all sequences.

    Either pass has all chunks but one, and the first scans one of them. Infinite where they are not all at
    work at once.
    """
    share = math.ceil(warps * (chunks - 1) / SCHEDULERS)
    if share > len(IN_CHUNKS):
        return math.inf
    first = chunk * (1 + SUMMARY * (chunks - 2)) / (chunks - 1)
    return STARTS + (first + chunk + FOLD * chunks) * IN_CHUNKS[share - 1]


@functools.lru_cache(maxsize=4096)
def choose(tokens: int, sequences: int, channels: int, streams: bool) -> Form:
    """The form for sequences of about equal lengths; streams: whether the inputs are such."""
    length, warps = -(-tokens // sequences), sequences * -(-channels // 16)
    if not (streams and STREAMED):
        chunks = min(ENOUGH // warps, length // SHORTEST)
        return Form(16 * -(-length // (16 * chunks))) if chunks >= 3 else Form()
    best, form = _whole(length, warps), Form(0, 1, 1, 1, 6 if length >= LONG and warps > MANY else 4, 96)
    # with more warps than schedulers, no chunks that were measured are faster than whole sequences
    for parts in range(3, min(length // SHORTEST_STREAMED, 128) + 1) if warps <= SCHEDULERS else ():
        chunk = 16 * -(-length // (16 * parts))
        cost = _two_passes(chunk, -(-length // chunk), warps)
        if cost < best:
            best, form = cost, Form(chunk, 1, 1, 1, 4)
    return form
