"""The constants of the kernels of `decode_layers`, and how much memory they hand each other vectors in."""

from __future__ import annotations

import math

from ssm_dist.kernels.gluon_layers_form import (
    PRODUCT_BYTES,
    ROUND,
    SCRATCH_BYTES,
    VECTOR,
    WARPS,
    X_WORDS,
    few_places,
    piece_bytes,
)

Sizes = dict[int, dict[str, int]]
"""Kernels' constants, by the most sequences that they take."""

ARENA_BYTES = 222 * 1024
"""Shared memory of a program, but for what the compiler needs."""

FEW_ARENA_BYTES = 224 * 1024
"""The same of the kernel for a few sequences."""

IN_FLIGHT = {False: 60_000, True: 50_000}
"""Bytes that a multiprocessor asks for ahead, alone and with other ranks (H200)."""

FEW_IN_FLIGHT = 40_000
"""The same for a few sequences."""

FEW = (4, 8)
"""Sequences at most, by kernel."""

MOST_SOURCES = 8
"""Of an output of out_proj, for a few sequences: parts of the width, over all ranks."""


def programs_of(d_model: int, multiprocessors: int) -> int:
    """At most one a multiprocessor; each has outputs of out_proj."""
    return math.ceil(d_model / math.ceil(d_model / multiprocessors))


def kernel_sizes(
    d_model: int, channels: int, dt_rank: int, states: int, programs: int, ranks: int
) -> dict[str, int]:
    """The kernel's constants that follow from sizes, for so many channels on a rank.

    CHUNKS: of 256 numbers in a part of a row that is fetched at once, so that what the last part lacks is
    within the zeros of a round of threads; SLOTS: pieces of the ring; BEFORE_X: turns of z before x_proj,
    while its input is on its way; AHEAD: pieces in flight.
    """
    widths = d_model, channels
    fitting = [c for c in range(3, 9) if all(_up(w, 256 * c) <= _up(w, ROUND) for w in widths)]
    chunks = min(fitting, key=lambda c: (sum(_up(w, 256 * c) for w in widths), -c))
    piece = piece_bytes(chunks)
    others = 2 * max(_up(w, VECTOR) for w in widths) + SCRATCH_BYTES + PRODUCT_BYTES
    turns = math.ceil(math.ceil(channels / programs) / WARPS)
    return {
        "P": programs, "H": d_model, "D": channels, "R": dt_rank, "N": states,
        "RANKS": ranks, "CHUNKS": chunks, "SLOTS": (ARENA_BYTES - others) // piece,
        "BEFORE_X": min(2, turns - 1), "AHEAD": max(2, round(IN_FLIGHT[ranks > 1] / piece)),
    }  # fmt: skip


def few_sizes(
    d_model: int, channels: int, dt_rank: int, states: int, programs: int, ranks: int, sequences: int
) -> dict[str, int] | None:
    """`kernel_sizes` for so many sequences; None where that kernel does not fit.

    Every program has as much: of a GPU's multiprocessors as many as divide both widths, 128 of 132.
    The widest pieces that divide both widths and of which the ring holds four: falcon-mamba-7b's eight
    sequences take 2.41 ms with four of 33 KB, 2.50 with eight of 17.
    """
    (own_in, rest), (own_out, left) = divmod(channels, programs), divmod(d_model, programs)
    if rest or left or own_in % 2 or own_out > 32:
        return None
    tile = 16 * WARPS  # of x_proj's outputs at a time; each program adds up as many, of which some may not be
    outputs = dt_rank + 2 * states
    if math.ceil(math.ceil(outputs / programs) * programs / tile) > math.ceil(outputs / tile):
        return None
    slots_of = {}
    for chunks in range(3, 9):
        parts, left = divmod(channels, 256 * chunks)
        if left or d_model % (256 * chunks) or programs % parts or parts * ranks > MOST_SOURCES:
            continue
        others = few_places(programs, d_model, chunks, outputs, own_out * parts, sequences)[-1]
        slots_of[chunks] = (FEW_ARENA_BYTES - others) // piece_bytes(chunks)
    chunks = max((chunks for chunks, slots in slots_of.items() if slots > 3), default=0)
    if not chunks:
        return None
    piece = piece_bytes(chunks)
    return {
        "P": programs, "H": d_model, "D": channels, "R": dt_rank, "N": states, "RANKS": ranks,
        "CHUNKS": chunks, "SLOTS": slots_of[chunks], "BEFORE_X": min(2, math.ceil(own_in / WARPS) - 1),
        "AHEAD": max(2, round(FEW_IN_FLIGHT / piece)), "SEQ": sequences,
    }  # fmt: skip


def words_within(constants: dict[str, int]) -> int:
    """Words that the programs of a rank hand each other, for constants of a kernel."""
    d_model, channels, programs = constants["H"], constants["D"], constants["P"]
    if "SEQ" not in constants:
        return 4 * _up(channels, VECTOR)
    sequences, own = constants["SEQ"], math.ceil((constants["R"] + 2 * constants["N"]) / programs)
    stream = sequences * d_model + 2 * programs * sequences
    return 2 * (stream + sequences * channels + 2 * programs * own * programs * sequences)


def words_of_ranks(sizes: Sizes) -> int:
    """Words, of 4 bytes, that a rank's memory has for what all ranks send it."""
    return sum(map(_words_of_ranks, sizes.values()))


def _words_of_ranks(constants: dict[str, int]) -> int:
    d_model = constants["H"]
    if "SEQ" not in constants:
        return 2 * constants["RANKS"] * (X_WORDS + _up(d_model, VECTOR))
    parts = constants["D"] // (256 * constants["CHUNKS"])
    numbers = constants["R"] + 2 * constants["N"] + 2 * parts * d_model
    return 2 * constants["RANKS"] * constants["SEQ"] * numbers


def _up(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple
