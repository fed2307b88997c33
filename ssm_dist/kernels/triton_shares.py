"""Sums that several programs share: each stores its part, and the last to finish adds all up, in order.

Which program is the last differs from run to run; what it adds, and in which order, does not.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTERS = 4096
"""Sums of one launch that programs can share."""


@functools.cache
def counters(device: torch.device) -> Tensor:
    """(COUNTERS,) int32 zeros, which every launch leaves as zeros. One stream at a time may use them."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


@triton.jit
def last_to_finish(counter, programs):
    """Whether all programs that share a counter have stored their parts; then it is zero again.

    The parts must be read past the L1 cache (".cg").
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter, 0)
    return last
