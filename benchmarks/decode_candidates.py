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
DEEP: tuning.Configuration = {"BLOCK_N": 64, "BLOCK_K": 128, "AHEAD": 0, "num_warps": 4}
SHARED: tuning.Configuration = {**DEEP, "PROGRAMS": 132, "num_stages": 5}
OUT: tuning.Configuration = {**DEEP, "PROGRAMS": 264, "num_stages": 4}
IN: tuning.Configuration = {**DEEP, "BLOCK_K": 64, "PROGRAMS": 264, "num_stages": 6}
JOINT: dict[int, dict[str, dict[str, tuning.Configuration | tuning.Rows]]] = {
    32: {
        "products": {"linear_32": [(16e6, SHARED), (tuning.ANY, IN)]},
        "out_proj": {"linear_32": [(3e6, {}), (16e6, SHARED), (tuning.ANY, {})]},
        "dt_proj, out_proj": {"linear_32": [(16e6, SHARED), (tuning.ANY, {})]},
    },
    4: {
        "out_proj by vector": {"linear_4": [(16e6, VECTOR[0]), (tuning.ANY, {})]},
        "small products by tensor cores": {"linear_4": {}},
        "update 8, 1 warp": {"projected_state_update": {"BLOCK_D": 8, "num_warps": 1}},
    },
    1: {
        "8 rows": {"linear_1": VECTOR[2]},
        "8 rows, 8 warps": {"linear_1": VECTOR[4]},
        "update 4": {"projected_state_update": {"BLOCK_D": 4, "num_warps": 1}},
        "update 8, 1 warp": {"projected_state_update": {"BLOCK_D": 8, "num_warps": 1}},
    },
    16: {"dt_proj by torch": {"linear_16": [(3e6, {}), (16e6, OUT), (tuning.ANY, IN)]}},
}
"""Sequences -> candidates of their steps -> op -> configuration, where it is not the recorded one."""
ROWS = {"linear_1": 1, "linear_4": 4, "linear_16": 16, "linear_32": 32}
"""Configured op -> rows to time."""
