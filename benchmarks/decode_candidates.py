"""Configurations that `decode_kernels` times: of layers alone, and of whole steps."""

from ssm_dist.kernels import tuning

VECTOR = [
    {"BLOCK_N": n, "AHEAD": ahead, "num_warps": warps}
    for n, ahead, warps in ((4, 0, 4), (4, 528, 4), (8, 0, 4), (8, 264, 4), (8, 0, 8), (16, 0, 8))
]
MATRIX = [
    {"BLOCK_N": n, "BLOCK_K": k, "AHEAD": 0, "PROGRAMS": programs, "num_warps": 4, "num_stages": stages}
    for n, k, programs, stages in (
        (64, 64, 264, 6), (64, 128, 264, 4), (64, 128, 132, 5), (128, 128, 132, 3),
    )
]  # fmt: skip
FOUR: tuning.Configuration = {"num_warps": 4, "num_stages": 4}
DEEP: tuning.Configuration = {"BLOCK_N": 64, "BLOCK_K": 128, "AHEAD": 0, "num_warps": 4}
SHARED: tuning.Configuration = {**DEEP, "PROGRAMS": 132, "num_stages": 5}
UPDATES: dict[str, dict[str, tuning.Configuration | tuning.Rows]] = {
    f"updates {channels}, {warps} warps" + (f" of {registers}" if registers else ""): {
        "projected_state_update": {
            "SEQUENCES": 16, "BLOCK_D": channels, "num_warps": warps,
            **({"maxnreg": registers} if registers else {}),
        }
    }
    for channels, warps, registers in (
        (16, 4, 0), (16, 4, 96), (16, 8, 0), (16, 8, 64), (32, 4, 0), (32, 8, 0),
    )
}  # fmt: skip
"""dt_proj joined with the state update of many sequences; some in fewer registers a thread than it takes."""
NARROW: dict[str, dict[str, tuning.Configuration | tuning.Rows]] = {
    f"x_proj {rows}x{columns}x{depth}, {programs}": {
        "linear_transposed": {
            "BLOCK_T": rows, "BLOCK_N": columns, "BLOCK_K": depth, "AHEAD": 0, "PROGRAMS": programs, **FOUR,
        }
    }
    for rows, columns, depth, programs in (
        (16, 64, 64, 132), (16, 64, 128, 132), (16, 64, 64, 264), (16, 32, 128, 132), (32, 64, 64, 132),
        (16, 64, 128, 96),
    )
}  # fmt: skip
"""x_proj of many sequences: rows dealt out, few enough that adding up the shares of a sum takes little."""
JOINT: dict[int, dict[str, dict[str, tuning.Configuration | tuning.Rows]]] = {
    64: {"dt_proj": {"linear_64": [(3e6, SHARED), (tuning.ANY, {})]}, **UPDATES, **NARROW},
    256: UPDATES,
    32: {**UPDATES, **NARROW},
    16: {**UPDATES, **NARROW},
    4: {"update 4": {"projected_state_update": {"BLOCK_D": 4, "num_warps": 1}}},
    1: {"update 4, 2 warps": {"projected_state_update": {"BLOCK_D": 4, "num_warps": 2}}},
}
"""Sequences -> candidates of their steps -> op -> configuration, where it is not the recorded one."""
ROWS = {"linear_1": 1, "linear_4": 4, "linear_16": 16, "linear_32": 32}
"""Configured op -> rows to time."""
