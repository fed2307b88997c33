"""Sums over ranks of the outputs of a linear layer with few rows, which its kernel pushes as it makes them.

A linear layer that stores its part, and a kernel after it that pushes that (`triton_push`), wait for each
other and for the memory between them. Here each program of the linear layer pushes a word of its outputs to
all ranks, in the same slots, and the kernel after it only takes: the link's latency passes while the linear
layer ends. The bits are those of the two ops one after the other, one-shot, if the linear layer's programs
have as many rows of the weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.kernels.codecs import DTYPES
from ssm_dist.kernels.dependent_launch import launch_options, start_next, wait_for_inputs
from ssm_dist.kernels.linear import empty_outputs
from ssm_dist.kernels.triton_linear import multiplies_by_vector, vector_blocks
from ssm_dist.kernels.triton_linear_kernels import vector_sums, weight_tiles
from ssm_dist.kernels.triton_push import (
    ALL,
    PushMemory,
    push_fits,
    push_sum,
    push_sum_add_rms_norm,
    unit_bytes,
)
from ssm_dist.kernels.triton_remote import push_word, word_of

WORD = 4
"""Bytes."""

TAKING = 2
"""The phase of `triton_push` that takes what was sent."""


# rank: as in triton_push
@triton.jit(do_not_specialize=["columns", "rank"])
def push_product_kernel(
    x, weight, x_row, weight_row, columns,
    rank, peers, counters, slots, slot_bytes, unit_bytes,
    K: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """One program: a word of each of TOKENS rows, BLOCK_N numbers, to all RANKS.

    unit_bytes: how much of the message (TOKENS, columns) a unit has. The rest: see `triton_push`.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    start_next(PDL)
    first = tl.program_id(0) * BLOCK_N
    row = weight + ((first + tl.arange(0, BLOCK_N)).to(tl.int64) * weight_row)[:, None]
    tiles = weight_tiles(row, K, BLOCK_K)
    wait_for_inputs(PDL)

    # A thread for each row and receiver. The counters are asked for before the inputs, and used after them.
    thread = tl.arange(0, THREADS)
    token, receiver = thread // RANKS, thread % RANKS
    wanted = token < TOKENS
    byte = (token * columns + first) * (DTYPE.primitive_bitwidth // 8)
    unit = byte // unit_bytes
    uses = tl.load(counters + unit, mask=wanted, other=0)
    totals = vector_sums(tiles, x, x_row, K, TOKENS, BLOCK_N, BLOCK_K)
    words = tl.zeros((THREADS,), tl.int32)
    for t in tl.static_range(TOKENS):
        if BLOCK_N == 2:
            low, high = tl.split(tl.reshape(totals[t], (1, 2)))
        else:
            low, high = totals[t], totals[t]
        words = tl.where(token == t, word_of(low, high, DTYPE), words)
    to = tl.zeros((THREADS,), tl.int64)
    for step in tl.static_range(RANKS):
        to = tl.where(receiver == step, peers[step], to)
    part = ((uses & 1) * RANKS + rank) * (slots.to(tl.int64) * slot_bytes)
    push_word(to + part + unit * slot_bytes + byte % unit_bytes, words, wanted)


def pushes_product(x: Tensor, weight: Tensor, memory: PushMemory, with_norm: bool) -> bool:
    """Whether `product_sum`, or `product_sum_add_rms_norm`, serves x (T, K) and weight (N, K)."""
    if x.dtype not in DTYPES or not multiplies_by_vector(x, weight):
        return False
    columns, numbers = weight.shape[0], WORD // x.itemsize
    if vector_blocks(x, weight, numbers)["BLOCK_N"] != numbers or len(x) * memory.ranks > 32:
        return False
    return push_fits(len(x), columns * x.itemsize, memory, with_norm)


def product_sum(x: Tensor, weight: Tensor, memory: PushMemory, phase: int = ALL) -> Tensor:
    """The sum of every rank's x W^T: x (T, K), weight (N, K); (T, N) of x's dtype."""
    like = empty_outputs(x, weight)
    if phase <= 0:
        _push(x, weight, unit_bytes(like.nbytes), memory)
    return push_sum(like, memory, two_shot=False, phase=TAKING) if phase else like


def product_sum_add_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, memory: PushMemory,
    phase: int = ALL,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`kernels.add_rms_norm` of that sum."""
    like = empty_outputs(x, weight)
    if phase <= 0:
        _push(x, weight, like.shape[1] * like.itemsize, memory)
    if phase == 0:
        return like, like
    return push_sum_add_rms_norm(like, residual, norm_weight, eps, memory, two_shot=False, phase=TAKING)


def _push(x: Tensor, weight: Tensor, unit: int, memory: PushMemory) -> None:
    blocks = vector_blocks(x, weight, WORD // x.itemsize)
    with torch.cuda.device_of(x):
        push_product_kernel[(weight.shape[0] // blocks["BLOCK_N"],)](
            x, weight, x.stride(0), weight.stride(0), weight.shape[0],
            memory.rank, memory.peers, memory.counters, memory.slots, memory.slot_bytes, unit,
            K=x.shape[1], TOKENS=len(x), RANKS=memory.ranks, THREADS=32 * blocks["num_warps"],
            BLOCK_N=blocks["BLOCK_N"], BLOCK_K=blocks["BLOCK_K"], num_warps=blocks["num_warps"],
            enable_fp_fusion=True, **launch_options(x.device),
        )  # fmt: skip
