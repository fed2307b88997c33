"""Which linear layers the kernel of `gluon_linear` serves, and in how many programs."""

from __future__ import annotations

import triton
from torch import Tensor

from ssm_dist.kernels import tuning
from ssm_dist.kernels.triton_shares import COUNTERS

ROWS, COLUMNS = 16, 16
"""Of x and of the weight, in one program at most."""
STEP, MOST_STEPS = 32, 10
"""Numbers of a row that a warp takes at once; how often at most, with eight registers a thread for each."""


def held_op(rows: int) -> str:
    """The tuning table's name for so many rows."""
    return f"linear_{tuning.padded(rows)}_held"


def held_form(x: Tensor, weight: Tensor) -> tuning.Configuration | None:
    """num_warps, and SHARES: programs that share a sum. None where another kernel is faster or has to serve.

    Whether there is such a GPU, and addresses divide by 16, is left to the caller: torch.compile asks this
    while tensors have no addresses.
    """
    (rows, width), columns = x.shape, weight.shape[0]
    if x.element_size() != 2 or width % 8 or x.stride(0) % 8:
        return None
    recorded = tuning.configuration(held_op(rows), weight.numel(), x.device)
    if not recorded:
        return None
    warps = recorded["num_warps"]
    tiles, steps = triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS), triton.cdiv(width, STEP * warps)
    shares = min(max(1, recorded["PROGRAMS"] // tiles), steps)
    if tiles > COUNTERS or triton.cdiv(steps, shares) > MOST_STEPS:
        return None
    return {"SHARES": shares, "num_warps": warps}
