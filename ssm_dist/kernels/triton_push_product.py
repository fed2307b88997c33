"""Sums over ranks of the outputs of a linear layer with few rows, which its kernel pushes as it makes them.

A linear layer that stores its part, and a kernel after it that pushes that (`triton_push`), wait for each
other and for the memory between them. Here each program of the linear layer pushes its outputs to all ranks,
a word at a time, in the same slots, and the kernel after it only takes: the link's latency passes while the
linear layer ends. The bits are those of the two ops one after the other, one-shot, if the linear layer's
programs have as many rows of the weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.kernels.dependent_launch import launch_options, start_next, wait_for_inputs
from ssm_dist.kernels.linear import empty_outputs, linear
from ssm_dist.kernels.triton_linear import (
    held_kernel,
    in_registers,
    matrix_blocks,
    served_by,
    vector_blocks,
)
from ssm_dist.kernels.triton_linear_kernels import (
    matrix_sums,
    matrix_tile,
    vector_sums,
    weight_tiles,
)
from ssm_dist.kernels.triton_push import (
    ALL,
    TAKE,
    PushMemory,
    push_fits,
    push_sum,
    push_sum_add_rms_norm,
    unit_bytes,
)
from ssm_dist.kernels.triton_remote import push_one, push_words, word_of

WORD = 4
"""Bytes."""

MATRIX_ROWS = 32
"""Of the tensor cores' kernel: of more, a thread would have to hold too many places."""


@triton.jit
def part_of(byte, wanted, rank, uses, slots, slot_bytes, unit_bytes, RANKS: tl.constexpr):
    """Offsets in any rank's memory of what this rank sends as the bytes `byte` of a message.

    wanted: which of them exist; None for all.
    """
    unit = byte // unit_bytes
    use = tl.load(uses + unit, mask=wanted)
    part = ((use & 1) * RANKS + rank) * (slots.to(tl.int64) * slot_bytes)
    return part + unit * slot_bytes + byte % unit_bytes


# rank: as in triton_push
@triton.jit(do_not_specialize=["columns", "rank"])
def push_vector_kernel(
    x, weight, x_row, weight_row, columns,
    rank, peers, uses, slots, slot_bytes, unit_bytes,
    K: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: a word of each of TOKENS rows, BLOCK_N numbers, to all RANKS.

    uses: the counters of `triton_push`, which explains the rest, too; unit_bytes: how much of the message
    (TOKENS, columns) a unit has.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    first = tl.program_id(0) * BLOCK_N
    row = weight + ((first + tl.arange(0, BLOCK_N)).to(tl.int64) * weight_row)[:, None]
    tiles = weight_tiles(row, K, BLOCK_K)
    wait_for_inputs(PDL)
    start_next(PDL)  # not before: what follows takes at once, and changes the counters

    # The counters are asked for before the inputs, and used after them.
    places = ()
    for t in tl.static_range(TOKENS):
        byte = (t * columns + first) * (DTYPE.primitive_bitwidth // 8)
        places += (part_of(byte, None, rank, uses, slots, slot_bytes, unit_bytes, RANKS),)
    totals = vector_sums(tiles, x, x_row, K, TOKENS, BLOCK_N, BLOCK_K)
    for t in tl.static_range(TOKENS):
        if BLOCK_N == 2:
            low, high = tl.split(tl.reshape(totals[t], (1, 2)))
        else:
            low, high = totals[t], totals[t]
        word = tl.sum(word_of(low, high, DTYPE), 0)
        for step in tl.static_range(RANKS):
            push_one(peers[step] + places[t], word, t * RANKS + step)


@triton.jit(do_not_specialize=["tokens", "shares", "across", "rank"])
def push_matrix_kernel(
    x, weight, parts, counters, x_row, tokens, columns, width, span, shares, across,
    rank, peers, uses, slots, slot_bytes, unit_bytes,
    SHARED: tl.constexpr, WHOLE: tl.constexpr, PDL: tl.constexpr, RANKS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One program: as `matrix_kernel`'s, its numbers to all RANKS."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    tile, share, begin, t, n, row = matrix_tile(
        weight, columns, width, span, shares, across, PDL, WHOLE, BLOCK_T, BLOCK_N, AHEAD
    )
    wait_for_inputs(PDL)
    start_next(PDL)  # as above

    even = tile % across * BLOCK_N + 2 * tl.arange(0, BLOCK_N // 2)[None, :]
    wanted = (t < tokens)[:, None] & (even < columns)
    part = part_of(
        (t[:, None] * columns + even) * 2, wanted, rank, uses, slots, slot_bytes, unit_bytes, RANKS
    )
    sums, last = matrix_sums(
        row, x, x, parts, counters + tile, x_row, t, n, tokens, columns, width, begin, span, share, shares,
        SHARED, WHOLE, False, BLOCK_T, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if last:
        low, high = tl.split(tl.reshape(sums, (BLOCK_T, BLOCK_N // 2, 2)))
        words = word_of(low, high, DTYPE)
        for step in tl.static_range(RANKS):
            push_words(peers[step] + part, words, wanted)


def pushes_product(x: Tensor, weight: Tensor, memory: PushMemory, with_norm: bool) -> bool:
    """Whether `product_sum`, or `product_sum_add_rms_norm`, serves x (T, K) and weight (N, K)."""
    kernel, columns, size = served_by(x, weight), weight.shape[0], x.element_size()
    if kernel is None or size not in (2, 4):
        return False
    numbers = WORD // size
    if columns % numbers or (kernel == "matrix" and len(x) > MATRIX_ROWS):
        return False
    if kernel == "vector" and not (in_registers(x, weight, numbers) and len(x) * memory.ranks <= 32):
        return False
    return push_fits(len(x), columns * size, memory, with_norm)


def product_sum(x: Tensor, weight: Tensor, memory: PushMemory, phase: int = ALL) -> Tensor:
    """The sum of every rank's x W^T: x (T, K), weight (N, K); (T, N) of x's dtype."""
    like = empty_outputs(x, weight)
    if not _pushed(x, weight, like, unit_bytes(like.nbytes), memory, phase):
        return push_sum(linear(x, weight), memory, two_shot=False, phase=phase)
    return push_sum(like, memory, two_shot=False, phase=TAKE) if phase else like


def product_sum_add_rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, memory: PushMemory,
    phase: int = ALL,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`kernels.add_rms_norm` of that sum.

    Nothing may be launched between the two kernels: the second reads the residual stream before it waits,
    since the first has waited for all that came before.
    """
    like, given = empty_outputs(x, weight), (residual, norm_weight, eps, memory, False)
    if not _pushed(x, weight, like, like.shape[1] * like.element_size(), memory, phase):
        return push_sum_add_rms_norm(linear(x, weight), *given, phase)
    return push_sum_add_rms_norm(like, *given, TAKE) if phase else (like, like)


def _pushed(x: Tensor, weight: Tensor, like: Tensor, unit: int, memory: PushMemory, phase: int) -> bool:
    """Push the outputs, which are as `like`, unless only what follows is asked for; False: that cannot be."""
    kernel = served_by(x, weight)
    held = held_kernel(x, weight) if kernel == "held" else None
    if kernel == "held" and held is None:
        return False  # the addresses are odd
    if phase > 0:
        return True
    how = {
        "rank": memory.rank, "peers": memory.peers, "uses": memory.counters, "slots": memory.slots,
        "slot_bytes": memory.slot_bytes, "unit_bytes": unit, "RANKS": memory.ranks, "enable_fp_fusion": True,
        **launch_options(x.device),
    }  # fmt: skip
    with torch.cuda.device_of(x):
        if held is not None:
            held(None, like, memory, unit)
        elif kernel == "vector":
            blocks = vector_blocks(x, weight, WORD // x.element_size())
            push_vector_kernel[(weight.shape[0] // blocks["BLOCK_N"],)](
                x, weight, x.stride(0), weight.stride(0), weight.shape[0],
                K=x.shape[1], TOKENS=len(x), BLOCK_N=blocks["BLOCK_N"], BLOCK_K=blocks["BLOCK_K"],
                num_warps=blocks["num_warps"], **how,
            )  # fmt: skip
        else:
            programs, numbers, constants = matrix_blocks(x, weight)
            words, threads = constants["BLOCK_T"] * constants["BLOCK_N"] // 2, 32 * constants["num_warps"]
            assert words >= threads, "words would be held, and sent, several times over: see triton_remote"
            push_matrix_kernel[(programs,)](x, weight, **numbers, **constants, **how)
    return True
