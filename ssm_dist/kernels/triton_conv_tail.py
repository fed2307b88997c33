"""The convolution's update as the tail of the kernel that makes its input: no launch or round trip more."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.kernels.triton_common import silu


class Conv(NamedTuple):
    """The arguments of `causal_conv_update`, but for its input."""

    taps: Tensor
    bias: Tensor | None
    state: Tensor
    slots: Tensor


@triton.jit
def taps_and_bias(taps, bias, channel, channels, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The weights of the inputs 0, 1, ... tokens back, then the bias, float32; zeros past `channels`."""
    mine = channel < channels
    found = ()
    for lag in tl.static_range(WIDTH):
        tap = tl.load(taps + channel * WIDTH + (WIDTH - 1 - lag), mask=mine, other=0.0)
        found += (tap.to(tl.float32),)
    offset = tl.zeros_like(mine).to(tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + channel, mask=mine, other=0.0).to(tl.float32)
    found += (offset,)
    return found


@triton.jit
def window_before(cells, row, inside, KEPT: tl.constexpr):
    """The KEPT inputs before the newest, oldest first; `cells` points at the oldest."""
    window = ()
    for k in tl.static_range(KEPT):
        window += (tl.load(cells + k * row, mask=inside, other=0.0),)
    return window


@triton.jit
def convolved(newest, window, weights, cells, row, inside, WIDTH: tl.constexpr):
    """silu(conv) of the newest inputs and the `window` before them, which moves on by one in the state.

    weights: `taps_and_bias`. inside: what to store.
    """
    KEPT: tl.constexpr = WIDTH - 1
    total = weights[WIDTH] + weights[0] * newest.to(tl.float32)
    for lag in tl.static_range(1, WIDTH):
        total += weights[lag] * window[KEPT - lag].to(tl.float32)
    tl.debug_barrier()  # several threads may hold a cell: all have read it before one of them writes it
    for k in tl.static_range(KEPT - 1):
        tl.store(cells + k * row, window[k + 1], mask=inside)
    tl.store(cells + (KEPT - 1) * row, newest.to(cells.dtype.element_ty), mask=inside)
    return silu(total)


def tail_arguments(conv: Conv | None, unused: Tensor) -> dict[str, Any]:
    """What the kernels that end in `convolved` take for it; WIDTH is 0 without a convolution."""
    if conv is None:
        return {
            "taps": unused, "conv_bias": unused, "state": unused, "slots": unused,
            "state_slot": 0, "state_row": 0, "channels": 0, "WIDTH": 0, "HAS_CONV_BIAS": False,
        }  # fmt: skip
    taps, bias, state, slots = conv
    return {
        "taps": taps, "conv_bias": unused if bias is None else bias, "state": state, "slots": slots,
        "state_slot": state.stride(0), "state_row": state.stride(1), "channels": taps.shape[0],
        "WIDTH": taps.shape[1], "HAS_CONV_BIAS": bias is not None,
    }  # fmt: skip
