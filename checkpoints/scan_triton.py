"""The selective scan of `fast_scan.py`, one Triton kernel each way: a program owns BLOCK channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fast_scan import Core
from torch import Tensor

BLOCK = 16
"""Channels a program holds. One warp then keeps 16 x 16 states in registers."""


@triton.jit
def _forward(u, dt, A, B, C, y, states, length, D, N: tl.constexpr, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, N)
    inside = d < D
    dn = d[:, None] * N + n[None, :]
    a = tl.load(A + dn, mask=inside[:, None], other=0.0)
    state = tl.zeros((BLOCK, N), dtype=tl.float32)
    for t in range(length):
        row = b * length + t
        step = tl.load(dt + row * D + d, mask=inside, other=0.0)
        value = step * tl.load(u + row * D + d, mask=inside, other=0.0)
        state = tl.exp(step[:, None] * a) * state + value[:, None] * tl.load(B + row * N + n)[None, :]
        tl.store(states + row * D * N + dn, state, mask=inside[:, None])
        tl.store(y + row * D + d, tl.sum(state * tl.load(C + row * N + n)[None, :], axis=1), mask=inside)


@triton.jit
def _backward(
    dy, u, dt, A, B, C, states, du, d_dt, dA, dB, dC, length, D, N: tl.constexpr, BLOCK: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    d = block * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, N)
    inside = d < D
    dn = d[:, None] * N + n[None, :]
    a = tl.load(A + dn, mask=inside[:, None], other=0.0)
    g = tl.zeros((BLOCK, N), dtype=tl.float32)
    sum_dA = tl.zeros((BLOCK, N), dtype=tl.float32)
    first = b * length
    last = first + length - 1
    state = tl.load(states + last * D * N + dn, mask=inside[:, None], other=0.0)
    for back in range(length):
        row = last - back
        # The first token has no state before it; nothing is read in front of the sequence.
        previous = tl.load(states + tl.maximum(row - 1, first) * D * N + dn, mask=inside[:, None], other=0.0)
        previous = tl.where(row > first, previous, 0.0)
        gradient = tl.load(dy + row * D + d, mask=inside, other=0.0)
        step = tl.load(dt + row * D + d, mask=inside, other=0.0)
        value = tl.load(u + row * D + d, mask=inside, other=0.0)
        in_row, out_row = tl.load(B + row * N + n), tl.load(C + row * N + n)
        g += gradient[:, None] * out_row[None, :]
        # Each block of channels writes its own part of dB and dC: a fixed order of addition, unlike atomics.
        part = (block * tl.num_programs(0) * length + row) * N + n
        tl.store(dC + part, tl.sum(gradient[:, None] * state, axis=0))
        tl.store(dB + part, tl.sum(g * (step * value)[:, None], axis=0))
        d_input = tl.sum(g * in_row[None, :], axis=1)
        g = g * tl.exp(step[:, None] * a)
        d_exponent = g * previous
        sum_dA += d_exponent * step[:, None]
        tl.store(du + row * D + d, d_input * step, mask=inside)
        tl.store(d_dt + row * D + d, d_input * value + tl.sum(d_exponent * a, axis=1), mask=inside)
        state = previous
    tl.store(dA + b * D * N + dn, sum_dA, mask=inside[:, None])


def forward(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """See `Core.forward`; contiguous float32."""
    b, length, channels = u.shape
    y, states = torch.empty_like(u), u.new_empty(b, length, channels, A.shape[1])
    grid = (b, triton.cdiv(channels, BLOCK))
    _forward[grid](u, dt, A, B, C, y, states, length, channels, A.shape[1], BLOCK, num_warps=1)
    return y, states


def backward(
    dy: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor
) -> tuple[Tensor, ...]:
    """See `Core.backward`; contiguous float32."""
    b, length, channels = u.shape
    grid = (b, triton.cdiv(channels, BLOCK))
    du, d_dt, dA = torch.empty_like(u), torch.empty_like(u), A.new_empty(b, *A.shape)
    dB, dC = B.new_empty(grid[1], *B.shape), C.new_empty(grid[1], *C.shape)
    _backward[grid](
        dy, u, dt, A, B, C, states, du, d_dt, dA, dB, dC, length, channels, A.shape[1], BLOCK, num_warps=1
    )
    return du, d_dt, dA.sum(0), dB.sum(0), dC.sum(0)


TRITON = Core(forward, backward)
