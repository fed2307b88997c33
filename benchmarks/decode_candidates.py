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
DEALT: dict[str, tuning.Configuration] = {
    f"{programs} x {n}x{k}, {stages} deep, {warps} warps" + (f", {ahead} ahead" if ahead else "")
    + {-1: "", 0: ", dealt out", 1: ", by descriptors"}[tma]: {
        "BLOCK_N": n, "BLOCK_K": k, "AHEAD": ahead, "PROGRAMS": programs,
        "num_warps": warps, "num_stages": stages, **({"TMA": tma} if tma >= 0 else {}),
    }
    for tma, programs, n, k, stages, warps, ahead in (
        (1, 132, 128, 64, 4, 4, 256), (1, 132, 128, 64, 6, 8, 256), (1, 264, 128, 64, 4, 4, 256),
        (1, 132, 64, 64, 6, 4, 256), (1, 264, 64, 64, 6, 4, 256), (1, 80, 128, 64, 6, 8, 256),
        (1, 128, 128, 64, 6, 8, 256), (1, 132, 128, 64, 4, 4, 0), (1, 132, 128, 64, 6, 8, 0),
        (1, 132, 128, 128, 3, 8, 0), (1, 264, 128, 64, 4, 4, 0), (1, 264, 64, 64, 6, 4, 0),
        (1, 132, 256, 64, 4, 8, 0), (0, 132, 128, 64, 6, 8, 0), (0, 264, 128, 64, 4, 4, 0),
        (-1, 132, 128, 128, 3, 4, 0), (-1, 264, 128, 64, 4, 4, 0),
    )
}  # fmt: skip
"""Of 17 to 64 rows: the weight dealt out evenly, by descriptors or pointers, or sums in equal shares."""
STEP_DEALT: dict[int, dict[str, dict[str, tuning.Configuration | tuning.Rows]]] = {
    rows: {
        f"dealt out: {name}": {f"linear_{rows}": [(3e6, {}), (tuning.ANY, DEALT[name])]}
        for name in list(DEALT)[:7]
    }
    for rows in (64, 32)
}
"""The same in whole steps, where other kernels lie between."""
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
    64: {"dt_proj": {"linear_64": [(3e6, SHARED), (tuning.ANY, {})]}, **STEP_DEALT[64], **UPDATES, **NARROW},
    256: UPDATES,
    32: {**STEP_DEALT[32], **UPDATES, **NARROW},
    16: {**UPDATES, **NARROW},
    4: {"update 4": {"projected_state_update": {"BLOCK_D": 4, "num_warps": 1}}},
    1: {"update 4, 2 warps": {"projected_state_update": {"BLOCK_D": 4, "num_warps": 2}}},
}
"""Sequences -> candidates of their steps -> op -> configuration, where it is not the recorded one."""
ROWS = {"linear_1": 1, "linear_4": 4, "linear_16": 16, "linear_32": 32}
"""Configured op -> rows to time."""
