"""What every fast implementation of an op over state slots promises, checked against `naive` in float64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

ROUNDING = {
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-5},
    torch.float16: {"rtol": 2**-10, "atol": 1e-5},
}
"""One unit in the last place; the interpreter truncates where a GPU rounds to nearest."""


def check_stateful(
    op: Callable[..., Tensor],
    naive: Callable[..., tuple[Tensor, Tensor]],
    inputs: list[Any],
    update: bool = False,
) -> None:
    """Output and named slots as naive has them; the slots not named hold NaN here, and still do after.

    `inputs` are those of the ragged op, (..., state, seq_offsets, slots); the update takes no offsets.
    """
    state, slots = inputs[-3], inputs[-1].long()
    unnamed = torch.ones(len(state), dtype=torch.bool).index_fill(0, slots, False)
    state[unnamed] = torch.nan
    expected, expected_state = naive(*inputs)
    y = op(*inputs[:-2], inputs[-1]) if update else op(*inputs)
    assert y.dtype == inputs[0].dtype and y.is_contiguous()
    assert_close(y.double(), expected, **ROUNDING[y.dtype])
    assert_close(state[slots].double(), expected_state[slots], **ROUNDING[state.dtype])
    assert state[unnamed].isnan().all()
