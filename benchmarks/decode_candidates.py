"""Configurations that `decode_kernels` times: of layers alone, and of whole steps."""

from ssm_dist.kernels import tuning
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


def narrow(op: str, config: tuning.Configuration) -> dict[str, tuning.Configuration | tuning.Rows]:
    """x_proj by another configuration, larger weights as recorded."""
    return {op: [(3e6, config), *(row for row in tuning.TABLE[op][90] if row[0] > 3e6)]}


JOINT: dict[int, dict[str, dict[str, tuning.Configuration | tuning.Rows]]] = {
    1: {
        "update 4, 2 warps": {"projected_state_update": {"BLOCK_D": 4, "num_warps": 2}},
        **{f"rows of {n}": {"linear_1": {"BLOCK_N": n, "AHEAD": 0, "num_warps": 4}} for n in (1, 4, 8)},
    },
    4: {
        "update 4": {"projected_state_update": {"BLOCK_D": 4, "num_warps": 1}},
        **{
            f"x_proj {n}": narrow("linear_4", {"BLOCK_N": n, "AHEAD": 0, "num_warps": 4}) for n in (1, 4, 8)
        },
    },
    **{
        rows: {
            "x_proj by torch": narrow(op, {}) | {held_op(rows): {}},
            **{
                f"x_proj {c['BLOCK_N']}x{c['BLOCK_K']}, {c['PROGRAMS']}": narrow(op, c) | {held_op(rows): {}}
                for c in candidates
            },
            **{
                f"x_proj held, {c['PROGRAMS']} by {c['num_warps']}": narrow(held_op(rows), c) for c in HELD
            },
        }
        for rows, op, candidates in (
            (8, "linear_16", MATRIX[4:]), (16, "linear_16", [*MATRIX[4:], DEALT[0]]),
            (32, "linear_32", DEALT), (64, "linear_64_deep", DEALT),
        )
    },
}  # fmt: skip
"""Sequences -> candidates of their steps -> op -> configuration, where it is not the recorded one."""
ROWS = (1, 4, 16, 32, 64)
"""Of the linear layers to time."""
