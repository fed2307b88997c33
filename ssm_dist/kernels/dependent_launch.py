"""Programmatic dependent launch (sm_90): a kernel starts, and fetches weights, while the one before it runs.

The rules that keep it correct. A kernel may be resident before *any* of its predecessors back to the last one
launched in the ordinary way has finished; so before `wait_for_inputs` it reads nothing but the model's
parameters, and it writes nothing: not even a buffer that only it uses, which an earlier kernel may still hold
under another name. Every kernel that is launched so must wait, in all its programs: what follows it relies on
its end for the end of everything before. Kernels launched in the ordinary way wait by themselves.

One exception: what directly follows a kernel that calls `start_next` only after its own wait comes after all
that was before that one. So it may read such results, past the L1 cache, and use memory that the kernel
before it does not read, before it waits (`triton_push`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ssm_dist.kernels import tuning

_enabled = True

PREFETCH = tl.constexpr("""{
    .reg .pred mine;
    .reg .u32 thread;
    mov.u32 thread, %tid.x;
    setp.lt.u32 mine, thread, $3;
    @mine cp.async.bulk.prefetch.L2.global [$1], $2;
    mov.u32 $0, 0;
}""")


def launch_options(device: torch.device) -> dict[str, Any]:
    """Arguments of a launch: the kernel's constant PDL, and Triton's own option where it is true."""
    if _enabled and tuning.architecture(device) >= 90:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@contextlib.contextmanager
def ordinary_launches() -> Iterator[None]:
    """Run a block without dependent launches (benchmarks, and the search for errors)."""
    global _enabled
    previous, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = previous


@triton.jit
def start_next(PDL: tl.constexpr):
    """Let the next kernel start as soon as all programs of this one have."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Return when everything launched before has finished, and its results can be read."""
    if PDL:
        gdc_wait()


@triton.jit
def prefetch(at, bytes, PDL: tl.constexpr):
    """Fetch `bytes` at each pointer of a block into the L2 cache: both divide by 16. Without PDL, nothing.

    Only the first threads ask, one for each pointer; the others hold copies.
    """
    if PDL:
        tl.inline_asm_elementwise(
            PREFETCH, "=r,l,r,r", [at.to(tl.int64), bytes, at.shape[0]], tl.int32, is_pure=False, pack=1
        )
