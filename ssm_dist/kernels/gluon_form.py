"""Forms of the selective scan on Hopper, and which one is taken."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator
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
    """Tokens that the first chunk of a sequence is shorter by: it is scanned while others are summarised."""


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
LATENCY, SHARE = 15, 50
"""Nanoseconds a token, and for each warp of a scheduler's: H100, whole sequences with 1, 2, 3, 5, 8 warps."""
IN_CHUNKS = (75, 112, 174, 209, 249)
"""Nanoseconds a token of sequences in chunks, with at most 1, 2, ... warps a scheduler: H100."""
STARTS, FOLD = 4750, 1.5
"""Nanoseconds for two passes to get under way, beyond one; folding a summary into a state, in tokens."""
SUMMARY = 0.85
"""Of a token's time, one without output. With the most warps a scheduler, cutting by it gained nothing."""
FEWEST = 7
"""Chunks of a sequence, where schedulers have several warps: fewer took up to a fifth longer than that."""
SHORTEST_STREAMED = 128
"""Tokens of the shortest chunk."""
ENOUGH, SHORTEST = 3800, 160
"""Warps in all chunks, and tokens of the shortest chunk, where loads go into registers."""


def cut_up(length: int, parts: int) -> tuple[int, int]:
    """Tokens of a chunk, and of these the first chunk's fewer, for its scan to take as long as a summary."""
    chunk = 8 * math.ceil(length / (8 * (parts - 1 + SUMMARY)))
    return chunk, int((1 - SUMMARY) * chunk) // 8 * 8


def even(length: int, parts: int) -> tuple[int, int]:
    """The same, of chunks that are as long as each other."""
    return 8 * -(-length // (8 * parts)), 0


def _in_chunks(length: int, warps: int) -> Iterator[tuple[float, Form]]:
    """Forms in two passes, either with all chunks of a sequence but one, and nanoseconds by `IN_CHUNKS`.

    warps: of one chunk of all sequences. Only forms whose warps are all at work at once.
    """
    for parts in range(3, length // SHORTEST_STREAMED + 1):
        share = math.ceil(warps * (parts - 1) / SCHEDULERS)
        if share > len(IN_CHUNKS):
            return
        if share == 1 or parts >= FEWEST:
            chunk, cut = (cut_up if share < len(IN_CHUNKS) else even)(length, parts)
            cost = STARTS + (2 * chunk - cut + FOLD * parts) * IN_CHUNKS[share - 1]
            yield cost, Form(chunk, 1, 1, 1, 4, None, cut)


@functools.lru_cache(maxsize=4096)
def choose(tokens: int, sequences: int, channels: int, streams: bool) -> Form:
    """The form for sequences of about equal lengths; streams: whether the inputs are such."""
    length, warps = -(-tokens // sequences), sequences * -(-channels // 16)
    if not (streams and STREAMED):
        chunks = min(ENOUGH // warps, length // SHORTEST)
        return Form(16 * -(-length // (16 * chunks))) if chunks >= 3 else Form()
    # a scheduler with one warp more than others holds them all up
    whole = length * (LATENCY + SHARE * math.ceil(warps / SCHEDULERS)), Form(0, 1, 1, 1, 4, 96)
    return min([whole, *_in_chunks(length, warps)], key=operator.itemgetter(0))[1]
