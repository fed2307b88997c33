"""Sums of low latency, by push: a rank stores its part into every rank's memory, in words that are flags.

No barrier, and no copy into a shared buffer. A *unit* is what one program sums: a row, with its residual and
norm, or a piece of a message. Unit u has a slot of fixed place in every rank's memory for each sender, twice:
a counter of the slot's uses, in the device's own memory, says which of the two a use takes. A rank begins use
j + 2 only when it has what all others sent in use j + 1, and they sent that after they had emptied use j. So
two are enough, whatever the units of the calls between, and also where one kernel sends and the next takes.

    one-shot    everybody stores to everybody, and adds up for himself
    two-shot    everybody stores to the unit's owner (u % ranks), who adds up and stores the sum to everybody

Everybody includes the sender: all ranks run the same code on the same words. Memory of a rank, in slots:
[2][ranks][slots] for parts, then [2][slots] for sums; all words EMPTY before the first use. The numbers are
added in float32, in rank order; a two-shot sum is rounded to the dtype once more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.kernels.dependent_launch import launch_options, start_next, wait_for_inputs
from ssm_dist.kernels.triton_remote import EMPTY, NAN_WORD, push, take_sum, taking, word_of

ALL, TAKE = -1, 2
"""Phases of a kernel: all at once; or only 0, what is sent, 1, added up by owners, or 2, taken. `TAKE` does
not look at x: it follows a kernel that sends by itself (`triton_push_product`). Tests play several ranks in
one process, one phase after the other."""

CODES = {"one_shot": 64, "two_shot": 128}
"""What the error word says of a wait of this file that failed, besides the missing rank."""

PIECE = 256
"""Times 16 bytes: a unit of a plain message at most."""

EARLY_ROWS = 1
"""With a norm of more rows, the next kernel starts at the end and not at once, as after a norm alone."""


@dataclass(frozen=True)
class PushMemory:
    """One rank's view of the memory of all."""

    rank: int
    peers: tuple[int, ...]
    """Addresses of the ranks' memories, from the next rank on around to the own."""
    counters: Tensor
    """(slots,) int32 on the device: uses of each slot."""
    error: Tensor
    """What `triton_remote.error_words` made: the code of a wait that failed, if one has."""
    slot_bytes: int
    limit: int
    """Nanoseconds that a wait may take."""

    @property
    def ranks(self) -> int:
        """How many share the memory."""
        return len(self.peers)

    @property
    def slots(self) -> int:
        """Units of a call at most."""
        return len(self.counters)


def push_bytes(ranks: int, slots: int, slot_bytes: int) -> int:
    """Bytes of a rank's memory; all 0xFF before the first use."""
    return 2 * (ranks + 1) * slots * slot_bytes


@triton.jit
def tile_of(a0, a1, b0, b1, c0, c1, d0, d1, DTYPE: tl.constexpr):
    """The halves of four words -> (BLOCK, 8 numbers, or 4 of float32), in order."""
    if DTYPE == tl.float32:  # noqa: SIM300
        bits = tl.join(tl.join(a0, b0), tl.join(c0, d0))  # [chunk, low bit of the word's index, high bit]
        tile = tl.reshape(tl.permute(bits, (0, 2, 1)), (a0.shape[0], 4))
    else:
        ab, cd = tl.join(tl.join(a0, a1), tl.join(b0, b1)), tl.join(tl.join(c0, c1), tl.join(d0, d1))
        tile = tl.reshape(tl.permute(tl.join(ab, cd), (0, 3, 2, 1)), (a0.shape[0], 8))
    return tile


# rank: the same code on all ranks, so that their bits agree; the others: nothing to gain from compiling again
@triton.jit(do_not_specialize=["rank", "chunks", "all_chunks"])
def _push_sum_kernel(
    x, residual, weight, y, total, eps, chunks, all_chunks,
    rank, peers, counters, error, limit, slots, slot_bytes,
    RANKS: tl.constexpr, TWO_SHOT: tl.constexpr, CODE: tl.constexpr,
    TAKE_PARTS: tl.constexpr, TAKE_SUM: tl.constexpr,
    WITH_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, PHASE: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: one unit, `chunks` times 16 bytes of the message's `all_chunks`.

    rank, peers, counters, error, limit: see `PushMemory`. PHASE: ALL, or one of them. What TAKE takes the
    kernel before has pushed, which let it start when everything earlier was over: so it may read, past the L1
    cache, and take, before it waits.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    PER_CHUNK: tl.constexpr = 4 if DTYPE == tl.float32 else 8  # noqa: SIM300
    if EARLY:
        start_next(PDL)
    if PHASE != 2:
        wait_for_inputs(PDL)  # for the counters, too, which the kernel before may be about to change
    unit = tl.program_id(0)
    chunk = tl.arange(0, BLOCK)
    inside = chunk < tl.minimum(chunks, all_chunks - unit * chunks)
    PAST_L1: tl.constexpr = ".cg" if PHASE == 2 else ""  # it may be out of date until it waits
    uses = tl.load(counters + unit, cache_modifier=PAST_L1)
    one_rank = slots.to(tl.int64) * slot_bytes
    in_slot = unit * slot_bytes + chunk * 16
    parts = (uses & 1) * RANKS * one_rank + in_slot
    sums = (2 * RANKS + (uses & 1)) * one_rank + in_slot
    begin = (unit.to(tl.int64) * chunks + chunk)[:, None]
    owner = unit % RANKS
    own, failed = peers[RANKS - 1], error.to(tl.int64)

    if PHASE <= 0:
        at = x.to(tl.pointer_type(tl.int32)) + begin * 4 + tl.arange(0, 4)[None, :]
        packed = tl.load(at, mask=inside[:, None], other=0)
        even, odd = tl.split(tl.reshape(tl.where(packed == EMPTY, NAN_WORD, packed), (BLOCK, 2, 2)))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        if TWO_SHOT:
            to = own
            for step in tl.static_range(RANKS - 1):
                to = tl.where((rank + 1 + step) % RANKS == owner, peers[step], to)
            push(to + parts + rank * one_rank, a, b, c, d, inside)
        else:
            for step in tl.static_range(RANKS):
                push(peers[step] + parts + rank * one_rank, a, b, c, d, inside)
    if TWO_SHOT and (PHASE < 0 or PHASE == 1):  # noqa: SIM102  (known to the compiler, unlike the owner)
        if owner == rank:
            a0, a1, b0, b1, c0, c1, d0, d1 = take_sum(
                own + parts, inside, one_rank, failed, limit, CODE, TAKE_PARTS, RANKS, DTYPE
            )
            a, b = word_of(a0, a1, DTYPE), word_of(b0, b1, DTYPE)
            c, d = word_of(c0, c1, DTYPE), word_of(d0, d1, DTYPE)
            for step in tl.static_range(RANKS):
                push(peers[step] + sums, a, b, c, d, inside)
    if PHASE < 0 or PHASE == 2:
        element = begin * PER_CHUNK + tl.arange(0, PER_CHUNK)[None, :]
        exists = tl.broadcast_to(inside[:, None], element.shape)
        if WITH_NORM:
            column = chunk[:, None] * PER_CHUNK + tl.arange(0, PER_CHUNK)[None, :]
            factor = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                stream = tl.load(residual + element, mask=exists, other=0.0, cache_modifier=PAST_L1)
        if TWO_SHOT:
            a0, a1, b0, b1, c0, c1, d0, d1 = take_sum(
                own + sums, inside, one_rank, failed, limit, CODE + owner, TAKE_SUM, 1, DTYPE
            )
        else:
            a0, a1, b0, b1, c0, c1, d0, d1 = take_sum(
                own + parts, inside, one_rank, failed, limit, CODE, TAKE_PARTS, RANKS, DTYPE
            )
        value = tile_of(a0, a1, b0, b1, c0, c1, d0, d1, DTYPE)
        if PHASE == 2:
            wait_for_inputs(PDL)
        if WITH_NORM:
            if HAS_RESIDUAL:
                value += stream
            tl.store(total + element, value, mask=exists)
            mean = tl.sum(tl.sum(value * value, 1), 0) / (chunks * PER_CHUNK)
            value = value * tl.rsqrt(mean + eps) * factor
        tl.store(y + element, value.to(y.dtype.element_ty), mask=exists)
        tl.debug_barrier()  # all threads have read the counter
        tl.store(counters + unit, uses + 1)


def push_fits(rows: int, row_bytes: int, memory: PushMemory, with_norm: bool) -> bool:
    """Whether `push_sum`, or `push_sum_add_rms_norm`, can send a message of so many rows."""
    if with_norm:
        return row_bytes % 16 == 0 and row_bytes <= memory.slot_bytes and rows <= memory.slots
    return rows * row_bytes % 16 == 0 and rows * row_bytes <= memory.slots * 16 * PIECE


def unit_bytes(message: int) -> int:
    """Of a plain message of so many bytes: how many a unit has."""
    return 16 * min(PIECE, max(32, triton.next_power_of_2(message // 16)))


def push_sum(x: Tensor, memory: PushMemory, two_shot: bool, phase: int = ALL) -> Tensor:
    """The sum of every rank's x, contiguous and of a multiple of 16 bytes; of x's shape and dtype."""
    y = torch.empty_like(x)
    _launch(x, None, None, y, None, 0.0, unit_bytes(x.nbytes) // 16, memory, two_shot, phase)
    return y


def push_sum_add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, memory: PushMemory, two_shot: bool,
    phase: int = ALL,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`kernels.add_rms_norm` of the sum of every rank's x (T, H), rows of a multiple of 16 bytes."""
    y = torch.empty_like(x, dtype=weight.dtype)
    total = torch.empty_like(x, dtype=torch.float32)
    _launch(x, residual, weight, y, total, eps, x.shape[1] * x.itemsize // 16, memory, two_shot, phase)
    return y, total


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, y: Tensor, total: Tensor | None, eps: float,
    chunks: int, memory: PushMemory, two_shot: bool, phase: int,
) -> None:  # fmt: skip
    assert x.is_contiguous() and x.nbytes % 16 == 0 and x.data_ptr() % 16 == 0
    assert residual is None or residual.is_contiguous()
    units = triton.cdiv(x.nbytes // 16, chunks)
    assert units <= memory.slots and 16 * chunks <= memory.slot_bytes, (units, chunks, memory)
    block = max(32, triton.next_power_of_2(chunks))
    with torch.cuda.device_of(x):
        _push_sum_kernel[(units,)](
            x, residual, weight, y, total, eps, chunks, x.nbytes // 16,
            memory.rank, memory.peers, memory.counters, memory.error, memory.limit,
            memory.slots, memory.slot_bytes,
            RANKS=memory.ranks, TWO_SHOT=two_shot, CODE=CODES["two_shot" if two_shot else "one_shot"],
            TAKE_PARTS=taking(memory.ranks, x.dtype), TAKE_SUM=taking(1, x.dtype),
            WITH_NORM=weight is not None, HAS_RESIDUAL=residual is not None, BLOCK=block, PHASE=phase,
            EARLY=weight is None or units <= EARLY_ROWS,
            num_warps=min(16, block // 32), enable_fp_fusion=True, **launch_options(x.device),
        )  # fmt: skip
