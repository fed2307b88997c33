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
    """Tokens that the first chunk of a sequence is shorter by."""
    whole: int = 0
    """Of the channels of a sequence, with chunks: those of so many programs stay whole."""
    early: bool = False
    """With stages: the first tiles are copied before what else a program begins with, and the wait for it."""


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
SUMMARY, FOLD = 0.85, 1.0
"""In tokens: one without output, and what folding a summary into a state takes."""
START, PASSES = 2000, 4000
"""Nanoseconds until a program is under way, and for a second pass."""
WORTH = 1.1
"""By how much a form with some channels whole, which has not been measured yet, is to be faster."""
LONG = 4096
"""Tokens from which more tiles ahead pay for the longer start."""
ENOUGH, SHORTEST = 3800, 160
"""Warps in all chunks, and tokens of the shortest chunk, where loads go into registers."""


def _nanoseconds(tokens: float, warps: int, held: float) -> float:
    """For so many tokens of each warp, of which a scheduler has registers for `held` at a time."""
    share = warps / SCHEDULERS
    if share > held:  # warps begin as others end, and all schedulers are busy until about the end
        return share / held * (START + tokens * (LATENCY + SHARE * held))
    return START + tokens * (LATENCY + SHARE * math.ceil(share))


def _two_passes(chunk: int, chunks: int, warps: int) -> float:
    """Nanoseconds for sequences in so many chunks; warps: of one chunk of all sequences.

    Either pass has all chunks but one, and in the first they take equally long.
    """
    at_work = warps * (chunks - 1)
    first, second = (
        _nanoseconds(SUMMARY * chunk, at_work, 4.5),
        _nanoseconds(chunk + FOLD * chunks, at_work, 4.5),
    )
    return PASSES + first + second


def cut_up(length: int, parts: int) -> tuple[int, int]:
    """Tokens of a chunk, and by how many the first is shorter: it is scanned while others are summarised."""
    chunk = 8 * math.ceil(length / (8 * (parts - 1 + SUMMARY)))
    return chunk, int((1 - SUMMARY) * chunk) // 8 * 8


def some_whole(length: int, sequences: int, blocks: int) -> tuple[float, Form]:
    """The best form where as many warps stay whole on each scheduler, after its nanoseconds."""
    best, form = math.inf, Form()
    held = sequences * blocks // SCHEDULERS
    whole = held * SCHEDULERS // sequences
    rest = sequences * (blocks - whole)
    for parts in range(3, min(length // 64, 16) + 1) if held and rest else ():
        chunk, cut = cut_up(length, parts)
        pieces = rest * (-(-(length + cut) // chunk) - 1)
        beside = held + math.ceil(pieces / SCHEDULERS)
        cost = PASSES + _nanoseconds(SUMMARY * chunk, pieces, 4.5) + START
        cost += chunk * (LATENCY + SHARE * beside) + (length - chunk) * (LATENCY + SHARE * held)
        if beside <= 4 and cost < best:
            best, form = cost, Form(chunk, 1, 1, 1, 4, 112, cut, whole)
    return best, form


@functools.lru_cache(maxsize=4096)
def choose(tokens: int, sequences: int, channels: int, streams: bool) -> Form:
    """The form for sequences of about equal lengths; streams: whether the inputs are such."""
    length, warps = -(-tokens // sequences), sequences * -(-channels // 16)
    if not (streams and STREAMED):
        chunks = min(ENOUGH // warps, length // SHORTEST)
        return Form(16 * -(-length // (16 * chunks))) if chunks >= 3 else Form()
    best, form = _nanoseconds(length, warps, 5), Form(0, 1, 1, 1, 6 if length >= LONG else 4, 96)
    for parts in range(3, min(length // 64, 128) + 1):
        chunk, cut = cut_up(length, parts)
        cost = _two_passes(chunk, -(-(length + cut) // chunk), warps)
        if cost < best:
            best, form = cost, Form(chunk, 1, 1, 1, 4, cut=cut)
    cost, mixed = some_whole(length, sequences, -(-channels // 16))
    return mixed if WORTH * cost < best else form
