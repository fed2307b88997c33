"""Configurations that `decode_kernels` times: of layers alone, and of whole steps."""

from typing import TypeAlias

import torch

from ssm_dist.kernels import triton_linear, tuning
from ssm_dist.kernels.gluon_linear_form import held_op

VECTOR = [
    {"BLOCK_N": n, "AHEAD": ahead, "num_warps": warps}
    for n, ahead, warps in (
        (4, 0, 4), (2, 0, 4), (1, 0, 4), (4, 528, 4), (8, 0, 4), (8, 264, 4), (8, 0, 8), (16, 0, 8),
    )
]  # fmt: skip
MATRIX = [
    {"BLOCK_N": n, "BLOCK_K": k, "AHEAD": 0, "PROGRAMS": programs, "num_warps": 4, "num_stages": stages}
    for n, k, programs, stages in (
        (64, 64, 264, 6), (64, 128, 264, 4), (64, 128, 132, 5), (128, 128, 132, 3), (32, 128, 96, 4),
        (32, 128, 48, 4),
    )
]  # fmt: skip
FOUR: tuning.Configuration = {"num_warps": 4, "num_stages": 4}
DEALT = [
    {"BLOCK_T": 16, "BLOCK_N": n, "BLOCK_K": k, "AHEAD": 0, "PROGRAMS": programs, **FOUR}
    for n, k, programs in ((64, 128, 96), (64, 128, 132), (64, 64, 132), (32, 128, 132))
]
"""For a small weight: rows in blocks."""
HELD: list[tuning.Configuration] = [
    {"PROGRAMS": programs, "num_warps": warps}
    for programs, warps in ((48, 4), (96, 4), (144, 4), (192, 4), (384, 4), (192, 8))
]
"""The weight in registers before x is there."""


Configurations: TypeAlias = dict[str, tuning.Configuration | tuning.Rows]
"""Op -> configuration, where it is not the recorded one."""
UPDATES: dict[int, dict[str, Configurations]] = {
    1: {"update 4, 2 warps": {"projected_state_update": {"BLOCK_D": 4, "num_warps": 2}}},
    4: {"update 4": {"projected_state_update": {"BLOCK_D": 4, "num_warps": 1}}},
}
"""Sequences -> candidates of the state update."""
SEQUENCES = (1, 4, 8, 16, 32, 64)
"""Of the steps to time by configuration."""


def replaced(op: str, size: int, config: tuning.Configuration) -> Configurations:
    """Weights of exactly that size by another configuration, the others as recorded."""
    recorded = tuning.TABLE[op][90]
    below = next(config for limit, config in recorded if size - 1 <= limit)
    return {
        op: [
            *(row for row in recorded if row[0] < size - 1),
            (size - 1, below),
            (size, config),
            *(row for row in recorded if row[0] > size),
        ]
    }


def of_layer(columns: int, width: int, sequences: int) -> dict[str, Configurations]:
    """Ways to multiply by a weight (N, K), by name. A way that is not to hold it in registers says so."""
    size = columns * width
    if sequences <= triton_linear.VECTOR_ROWS:
        op = triton_linear.vector_op(sequences)
        return {f"rows of {c['BLOCK_N']}": replaced(op, size, c) for c in (*VECTOR[:3], VECTOR[4])}
    rows, held = tuning.padded(sequences), held_op(sequences)
    op = triton_linear.matrix_op(sequences, torch.empty(columns, width, device="meta"))
    tiles = {
        f"{c.get('BLOCK_T', rows)}x{c['BLOCK_N']}x{c['BLOCK_K']}, {c['PROGRAMS']}": c
        for c in (*MATRIX, *(DEALT if rows > 16 else DEALT[:1]))
    }
    not_held = replaced(held, size, {})
    return {
        **{way: replaced(op, size, c) | not_held for way, c in {"torch": {}, **tiles}.items()},
        **{f"held, {c['PROGRAMS']} by {c['num_warps']}": replaced(held, size, c) for c in HELD},
    }


def of_steps(layers: dict[str, tuple[int, int]], sequences: int) -> dict[str, Configurations]:
    """Candidates of a decode step, one layer at a time; layers: (N, K) by name."""
    ways = {
        f"{layer}: {way}": configurations
        for layer, shape in layers.items()
        for way, configurations in of_layer(*shape, sequences).items()
    }
    return UPDATES.get(sequences, {}) | ways


ROWS = (1, 4, 16, 32, 64)
"""Of the linear layers to time."""
