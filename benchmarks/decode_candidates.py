"""Configurations that `decode_kernels` times: of layers alone, and of whole steps."""

from ssm_dist.kernels import tuning

VECTOR = [
    {"BLOCK_N": n, "AHEAD": ahead, "num_warps": warps}
    for n, ahead, warps in ((4, 0, 4), (4, 528, 4), (8, 0, 4), (8, 264, 4), (8, 0, 8), (16, 0, 8))
]
MATRIX = [
    {"BLOCK_N": n, "BLOCK_K": k, "AHEAD": ahead, "PROGRAMS": programs, "num_warps": 4, "num_stages": stages}
    for n, k, ahead, programs, stages in (
        (64, 64, 0, 264, 6), (64, 128, 0, 264, 4), (128, 64, 0, 264, 4), (64, 64, 512, 264, 6),
        (64, 128, 0, 132, 5), (128, 128, 0, 132, 3),
    )
]  # fmt: skip
TILES = {
    name: {"BLOCK_N": 64, "BLOCK_K": k, "AHEAD": 0, "PROGRAMS": programs, "num_warps": 4, "num_stages": deep}
    for name, k, programs, deep in (
        ("in", 64, 264, 6), ("out", 128, 264, 4), ("small", 128, 132, 5),
        ("x", 64, 96, 4), ("x2", 128, 120, 4),
    )
}  # fmt: skip
PRODUCTS: tuning.Rows = [(2e6, TILES["small"]), (16e6, TILES["out"]), (tuning.ANY, TILES["in"])]
"""dt_proj; out_proj; in_proj and the head."""
JOINT: dict[int, dict[str, dict[str, tuning.Configuration | tuning.Rows]]] = {
    16: {
        "x_proj": {"linear_transposed": TILES["x"]},
        "x_proj, K=128": {"linear_transposed": TILES["x2"]},
        "products": {"linear_16": PRODUCTS},
        "products, x_proj": {"linear_16": PRODUCTS, "linear_transposed": TILES["x"]},
        "dt_proj, x_proj": {"linear_16": [*PRODUCTS[:1], (tuning.ANY, {})], "linear_transposed": TILES["x"]},
        "dt_proj, out_proj, x_proj": {
            "linear_16": [*PRODUCTS[:2], (tuning.ANY, {})], "linear_transposed": TILES["x"]
        },
    },
    64: {
        "x_proj": {"linear_transposed": TILES["x"]},
        "x_proj, K=128": {"linear_transposed": TILES["x2"]},
        "dt_proj, x_proj": {"linear_64": [*PRODUCTS[:1], (tuning.ANY, {})], "linear_transposed": TILES["x"]},
        "dt_proj, out_proj, x_proj": {
            "linear_64": [*PRODUCTS[:1], (16e6, TILES["small"]), (tuning.ANY, {})],
            "linear_transposed": TILES["x"],
        },
    },
    4: {
        "products by tensor cores": {"linear_vector": [(tuning.ANY, {})], "linear_16": PRODUCTS},
        "large products by tensor cores": {
            "linear_vector": [(2e6, VECTOR[0]), (tuning.ANY, {})], "linear_16": PRODUCTS
        },
        "8 rows": {"linear_vector": VECTOR[2]},
        "conv 256": {"projected_conv_update": {"BLOCK_D": 256, "BLOCK_P": 32, "num_warps": 8}},
        "update 8": {"projected_state_update": {"BLOCK_D": 8, "num_warps": 2}},
    },
    1: {
        "conv 128": {"projected_conv_update": {"BLOCK_D": 128, "BLOCK_P": 32, "num_warps": 4}},
        "conv 64": {"projected_conv_update": {"BLOCK_D": 64, "BLOCK_P": 32, "num_warps": 4}},
        "conv 32": {"projected_conv_update": {"BLOCK_D": 32, "BLOCK_P": 64, "num_warps": 4}},
        "update 8": {"projected_state_update": {"BLOCK_D": 8, "num_warps": 2}},
        "update 32": {"projected_state_update": {"BLOCK_D": 32, "num_warps": 8}},
        "update 16, 2 warps": {"projected_state_update": {"BLOCK_D": 16, "num_warps": 2}},
    },
}  # fmt: skip
"""Sequences -> candidates of their steps -> op -> configuration, where it is not the recorded one."""
ROWS = {"linear_vector": (1, 4), "linear_16": (16,), "linear_32": (32,), "linear_64": (64,)}
"""Configured op -> rows to time."""
