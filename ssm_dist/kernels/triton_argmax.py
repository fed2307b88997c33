"""Triton kernel of the largest number of each row. Bound by latency: torch's takes one program a row.

Several programs share a row; the last of them to finish joins what they have found. A number and its column
are compared as one integer, so that each program reduces once.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.kernels import backend, tuning
from ssm_dist.kernels.argmax import largest_reference
from ssm_dist.kernels.dependent_launch import launch_options, start_next, wait_for_inputs
from ssm_dist.kernels.operators import operator
from ssm_dist.kernels.triton_shares import COUNTERS, counters, last_to_finish

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST = tl.constexpr(2**31 - 1)
INFINITY_BITS = tl.constexpr(0x7F800000)
BELOW_ALL = tl.constexpr(-(2**63))


@triton.jit
def sort_key(value, column):
    """int64 that order numbers as torch.max does: by value, NaN on top, the lowest column among equals.

    The upper half has a float's order: its sign and magnitude as a two's complement, where 0 and -0 are one.
    The lower half is a column subtracted from MOST, which is to flip its bits.
    """
    bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = bits & MOST
    ordered = tl.where(bits < 0, -magnitude, magnitude)
    ordered = tl.where(magnitude > INFINITY_BITS, MOST, ordered)
    return (ordered.to(tl.int64) << 32) | (column ^ MOST).to(tl.int64)


@triton.jit(do_not_specialize=["row_units", "width_units", "blocks"])
def _largest_kernel(
    logits, values, ids, parts, counters, row_units, width_units, blocks,
    UNIT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK columns of a row. PARTS: a power of two from `blocks`, the programs of a row, on.

    Rows are row_units * UNIT apart and width_units * UNIT wide: as many numbers can be loaded at once.
    """
    start_next(PDL)
    row = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    column = block * BLOCK + tl.arange(0, BLOCK)
    begin = logits + row.to(tl.int64) * row_units * UNIT
    wait_for_inputs(PDL)
    # Columns past the end are below all others, even of a row of -inf.
    value = tl.load(begin + column, mask=column < width_units * UNIT, other=float("-inf"))
    best = tl.max(sort_key(value, column), 0)
    last = True
    if PARTS > 1:
        parts += row.to(tl.int64) * blocks
        tl.store(parts + block, best)
        last = last_to_finish(counters + row, blocks)
        if last:
            part = tl.arange(0, PARTS)
            found = tl.load(parts + part, mask=part < blocks, other=BELOW_ALL, cache_modifier=".cg")
            best = tl.max(found, 0)
    if last:
        where = (best & MOST) ^ MOST
        tl.store(ids + row, where)
        tl.store(values + row, tl.load(begin + where))


def _values_and_ids(logits: Tensor) -> tuple[Tensor, Tensor]:
    rows = logits.shape[:1]
    return logits.new_empty(rows), logits.new_empty(rows, dtype=torch.int64)


@operator("largest", fake=_values_and_ids)
def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = _values_and_ids(logits)
    rows, width = logits.shape
    if rows:
        config = tuning.configuration("largest", rows, logits.device)
        blocks = triton.cdiv(width, config["BLOCK"])
        between = logits.stride(0) if rows > 1 else 0
        unit = math.gcd(16 // logits.element_size(), between, width)
        with torch.cuda.device_of(logits):
            _largest_kernel[(rows * blocks,)](
                logits, values, ids, ids.new_empty(rows * blocks), counters(logits.device),
                between // unit, width // unit, blocks, UNIT=unit, PARTS=triton.next_power_of_2(blocks),
                **config, **launch_options(logits.device),
            )  # fmt: skip
    return values, ids


@backend.register("largest", "triton")
def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`ssm_dist.kernels.largest`: by this kernel where it serves, otherwise as torch does it."""
    if logits.dtype not in DTYPES or logits.stride(-1) != 1 or logits.shape[0] > COUNTERS:
        return largest_reference(logits)
    return _largest(logits)
