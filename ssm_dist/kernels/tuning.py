"""Launch configurations of the Triton kernels: chosen offline, recorded here, never searched while serving.

A search at run time could make ranks differ, and its first answers come late. The rows for sm_90 come from
`ssm-dist kernels --sweep` and `benchmarks/decode_kernels.py` on an H200 (132 multiprocessors, 4.2 TB/s) and
an H100. Those for sm_80 and sm_86 are reasoned from them: a third to a half of the bandwidth needs fewer
bytes in flight, and 64 KB of registers feed the same number of warps, so tiles as small or smaller reach the
same occupancy.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TypeAlias

import torch

Configuration: TypeAlias = dict[str, int]
Rows: TypeAlias = list[tuple[float, Configuration]]
"""(largest size, configuration), rising; an op's wrapper says what its size counts."""

ANY = float("inf")
FOUR_DEEP: Configuration = {"num_warps": 4, "num_stages": 4}
FIVE_DEEP: Configuration = {"num_warps": 4, "num_stages": 5}
SIX_DEEP: Configuration = {"num_warps": 4, "num_stages": 6}

TABLE: dict[str, dict[int, Rows]] = {
    # size: numbers of one sequence; of several, whose programs look theirs up, which longer blocks do less
    # often, infinite. Between one wave of programs and two, longer blocks make it one
    "causal_conv": {
        90: [
            (3e6, {"BLOCK_T": 16, "TILE": 16, "BLOCK_D": 128, "num_warps": 1}),
            (6e6, {"BLOCK_T": 8, "TILE": 8, "BLOCK_D": 256, "num_warps": 1}),
            (1e15, {"BLOCK_T": 16, "TILE": 16, "BLOCK_D": 128, "num_warps": 1}),
            (ANY, {"BLOCK_T": 16, "TILE": 8, "BLOCK_D": 256, "num_warps": 2}),
        ],
        80: [
            (1e15, {"BLOCK_T": 8, "TILE": 8, "BLOCK_D": 128, "num_warps": 1}),
            (ANY, {"BLOCK_T": 16, "TILE": 8, "BLOCK_D": 128, "num_warps": 1}),
        ],
    },
    # size: sequences * channels
    "causal_conv_update": {
        90: [
            (16e3, {"SEQUENCES": 1, "BLOCK_D": 128, "num_warps": 1}),
            (1e6, {"SEQUENCES": 2, "BLOCK_D": 256, "num_warps": 2}),
            (ANY, {"SEQUENCES": 2, "BLOCK_D": 512, "num_warps": 2}),
        ],
        80: [
            (512e3, {"SEQUENCES": 1, "BLOCK_D": 128, "num_warps": 1}),
            (ANY, {"SEQUENCES": 2, "BLOCK_D": 256, "num_warps": 1}),
        ],
    },
    # size: sequences * channels * states
    "selective_state_update": {
        90: [
            (512e3, {"SEQUENCES": 1, "BLOCK_D": 16, "num_warps": 1}),
            (ANY, {"SEQUENCES": 1, "BLOCK_D": 64, "num_warps": 2}),
        ],
        80: [
            (1e6, {"SEQUENCES": 1, "BLOCK_D": 16, "num_warps": 1}),
            (ANY, {"SEQUENCES": 2, "BLOCK_D": 64, "num_warps": 4}),
        ],
    },
    # size: sequences. With SEQUENCES, on the tensor cores; empty: by separate kernels
    "projected_state_update": {
        90: [
            (1, {"BLOCK_D": 4, "num_warps": 1}),
            (8, {"BLOCK_D": 8, "num_warps": 2}),
            (16, {"SEQUENCES": 16, "BLOCK_D": 16, "num_warps": 4}),
            (ANY, {"SEQUENCES": 16, "BLOCK_D": 32, "num_warps": 4}),
        ],
        80: [(8, {"BLOCK_D": 16, "num_warps": 2}), (ANY, {})],
    },
    # size: rows. EARLY: the next kernel starts at once and not at the end. Steps of several rows are up to
    # 8 % faster when a linear layer's programs do not wait among those of the one before the norm
    "add_rms_norm": {
        90: [
            (1, {"num_warps": 8, "EARLY": 1}),
            (264, {"num_warps": 8, "EARLY": 0}),
            (ANY, {"num_warps": 4, "EARLY": 0}),
        ],
        80: [(216, {"num_warps": 8, "EARLY": 0}), (ANY, {"num_warps": 4, "EARLY": 0})],
    },
    # size: rows
    "largest": {
        90: [(8, {"BLOCK": 1024, "num_warps": 4}), (ANY, {"BLOCK": 4096, "num_warps": 4})],
        80: [(8, {"BLOCK": 1024, "num_warps": 4}), (ANY, {"BLOCK": 4096, "num_warps": 4})],
    },
    # size: bytes of an element (what a tile of 64 queries of 512 takes in shared memory follows from it)
    "paged_attention": {
        90: [
            (2, {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3}),
            (ANY, {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}),
        ],
        80: [
            (2, {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}),
            (ANY, {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}),
        ],
    },
    # 1 row, on the ordinary units; size: numbers of the weight
    "linear_1": {
        90: [(ANY, {"BLOCK_N": 2, "AHEAD": 0, "num_warps": 4})],
        80: [(ANY, {"BLOCK_N": 4, "AHEAD": 0, "num_warps": 4})],
    },
    # up to 4 rows; size: numbers of the weight. Empty: on the tensor cores, as up to 16 rows
    "linear_4": {
        90: [(3e6, {"BLOCK_N": 2, "AHEAD": 0, "num_warps": 4}), (ANY, {})],
        80: [(3e6, {"BLOCK_N": 4, "AHEAD": 0, "num_warps": 4}), (ANY, {})],
    },
    # 5 to 16 rows, up to 32 and 64, with the weight in registers; size: numbers of the weight. PROGRAMS as
    # below. Empty: by what follows. Alone, larger weights gain by it, too, but in steps they lose
    "linear_16_held": {
        90: [
            (1.2e6, {"PROGRAMS": 96, "num_warps": 4}),
            (2.5e6, {"PROGRAMS": 144, "num_warps": 4}),
            (3.5e6, {"PROGRAMS": 192, "num_warps": 8}),
            (ANY, {}),
        ],
        80: [(ANY, {})],
    },
    "linear_32_held": {
        90: [
            (1e6, {"PROGRAMS": 96, "num_warps": 4}),
            (1.2e6, {"PROGRAMS": 192, "num_warps": 4}),
            (ANY, {}),
        ],
        80: [(ANY, {})],
    },
    "linear_64_held": {
        90: [
            (0.3e6, {"PROGRAMS": 48, "num_warps": 4}),
            (1e6, {"PROGRAMS": 192, "num_warps": 4}),
            (1.2e6, {"PROGRAMS": 384, "num_warps": 4}),
            (ANY, {}),
        ],
        80: [(ANY, {})],
    },
    # up to 16, 32, 64 rows; size: numbers of the weight; PROGRAMS to aim at by sharing sums. Empty: by torch.
    # Some are up to 13 % slower alone than torch's, but not in steps, where dependent launch overlaps them;
    # x_proj's of 5 to 16 rows, where they are not held, are slower in steps. Of 64 rows, those from 30e6 and
    # from 60e6 on are heads of 12,570 and 25,140 outputs, which torch multiplies slowly
    "linear_16": {
        90: [
            (3e6, {}),
            (10e6, {"BLOCK_N": 64, "BLOCK_K": 128, "AHEAD": 0, "PROGRAMS": 264, **FOUR_DEEP}),
            (16e6, {"BLOCK_N": 64, "BLOCK_K": 128, "AHEAD": 0, "PROGRAMS": 132, **FIVE_DEEP}),
            (30e6, {"BLOCK_N": 64, "BLOCK_K": 64, "AHEAD": 0, "PROGRAMS": 264, **SIX_DEEP}),
            (36e6, {"BLOCK_N": 64, "BLOCK_K": 128, "AHEAD": 0, "PROGRAMS": 132, **FIVE_DEEP}),
            (ANY, {"BLOCK_N": 64, "BLOCK_K": 64, "AHEAD": 0, "PROGRAMS": 264, **SIX_DEEP}),
        ],
        80: [(ANY, {"BLOCK_N": 64, "BLOCK_K": 64, "AHEAD": 0, "PROGRAMS": 324, **FOUR_DEEP})],
    },
    # up to 16 rows, where the sums are longer than there are outputs
    "linear_16_deep": {
        90: [
            (3e6, {}),
            (16e6, {"BLOCK_N": 64, "BLOCK_K": 128, "AHEAD": 0, "PROGRAMS": 132, **FIVE_DEEP}),
            (ANY, {"BLOCK_N": 64, "BLOCK_K": 64, "AHEAD": 0, "PROGRAMS": 264, **SIX_DEEP}),
        ],
        80: [(ANY, {"BLOCK_N": 64, "BLOCK_K": 64, "AHEAD": 0, "PROGRAMS": 324, **FOUR_DEEP})],
    },
    "linear_32": {
        90: [
            (3e6, {"BLOCK_T": 16, "BLOCK_N": 64, "BLOCK_K": 128, "AHEAD": 0, "PROGRAMS": 96, **FOUR_DEEP}),
            (16e6, {"BLOCK_N": 64, "BLOCK_K": 128, "AHEAD": 0, "PROGRAMS": 132, **FIVE_DEEP}),
            (ANY, {}),
        ],
        80: [(ANY, {"BLOCK_N": 64, "BLOCK_K": 64, "AHEAD": 0, "PROGRAMS": 324, **FOUR_DEEP})],
    },
    "linear_64": {
        90: [
            (30e6, {}),
            (33e6, {"BLOCK_N": 64, "BLOCK_K": 64, "AHEAD": 0, "PROGRAMS": 264, **SIX_DEEP}),
            (60e6, {}),
            (66e6, {"BLOCK_N": 64, "BLOCK_K": 64, "AHEAD": 0, "PROGRAMS": 264, **SIX_DEEP}),
            (100e6, {}),
            (ANY, {"BLOCK_N": 64, "BLOCK_K": 64, "AHEAD": 0, "PROGRAMS": 264, **SIX_DEEP}),
        ],
        80: [(ANY, {"BLOCK_N": 64, "BLOCK_K": 64, "AHEAD": 0, "PROGRAMS": 216, **FOUR_DEEP})],
    },
    # the same of up to 64 rows
    "linear_64_deep": {
        90: [
            (3e6, {"BLOCK_T": 16, "BLOCK_N": 64, "BLOCK_K": 128, "AHEAD": 0, "PROGRAMS": 96, **FOUR_DEEP}),
            (ANY, {"BLOCK_N": 64, "BLOCK_K": 128, "AHEAD": 0, "PROGRAMS": 132, **FIVE_DEEP}),
        ],
        80: [(ANY, {"BLOCK_N": 64, "BLOCK_K": 64, "AHEAD": 0, "PROGRAMS": 216, **FOUR_DEEP})],
    },
}

_forced: dict[str, Rows] = {}


def padded(rows: int) -> int:
    """Rows of a tile of the tensor cores for so many, 64 at most; names of linear layers here have it."""
    return next(tile for tile in (16, 32, 64) if rows <= tile)


def configuration(op: str, size: float, device: torch.device) -> Configuration:
    """The configuration of `op` for that size, on the newest recorded architecture not newer than `device`.

    Devices older than all of them, and the interpreter, use the oldest.
    """
    rows = _forced.get(op)
    if rows is None:
        architectures = TABLE[op]
        known = [a for a in architectures if a <= architecture(device)] or [min(architectures)]
        rows = architectures[max(known)]
    return next(config for limit, config in rows if size <= limit)


@contextlib.contextmanager
def forced(op: str, config: Configuration | Rows) -> Iterator[None]:
    """Run a block with one configuration of `op`, or one by size (sweeps; tests of block boundaries)."""
    _forced[op] = config if isinstance(config, list) else [(ANY, config)]
    try:
        yield
    finally:
        del _forced[op]


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability as one number, 90 for 9.0; 0 for a CPU, where Triton's interpreter runs."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the device; 1 of a CPU, where the interpreter's programs take turns."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
