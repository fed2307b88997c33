"""Sums of long messages whose numbers travel by the copy engines: the multiprocessors only add up.

The same two shots as in `triton_bulk`, in the same memory and with the same bits, but a step at a time: all
parts are copied to the owners of their rows, then flags are raised and awaited by a single program, then a
kernel adds up, and so on. Alone this takes longer, since nothing overlaps within a sum; beside the compute of
something else it takes little from it, since no program waits or stores over the link.

Why nothing is overwritten before it was read: parts are sent when the others' flags of the sum before stand
at its last step, which each rank raises after it has added up. Sums are sent after the others' flags of the
first step, which each raises after its sum before is over, and with it what it collected.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.kernels.carveout import let_others_beside
from ssm_dist.kernels.codecs import row_layout
from ssm_dist.kernels.triton_bulk import CODE, PROGRAMS, BulkMemory, flag_bytes
from ssm_dist.kernels.triton_bulk_tiles import add_up, collect, send_parts
from ssm_dist.kernels.triton_codec_tiles import CHUNK, CODES, ROWS
from ssm_dist.kernels.triton_remote import raise_flag, wait_for_flag

FLAG = PROGRAMS - 1
"""The program of the other kernel whose flags and count are used here; it never has so many."""

STEPS = 2
"""That a sum counts: parts have come, sums have come."""


@triton.jit(do_not_specialize=["rank"])
def _meet_kernel(
    rank, peers, epochs, error, limit,
    RANKS: tl.constexpr, CODE: tl.constexpr, FLAGS: tl.constexpr, FLAG: tl.constexpr,
):  # fmt: skip
    """One program: tell the others that this rank has come so far, and wait until they all have."""
    count = tl.load(epochs + FLAG) + 1
    failed, own = error.to(tl.int64), peers[RANKS - 1]
    for other in tl.static_range(RANKS - 1):
        raise_flag(peers[other] + rank * FLAGS + FLAG * 4, count)
    for other in tl.static_range(RANKS - 1):
        sender = (rank + 1 + other) % RANKS
        wait_for_flag(own + sender * FLAGS + FLAG * 4, count, failed, limit, CODE + sender)
    tl.debug_barrier()
    tl.store(epochs + FLAG, count)


@triton.jit(do_not_specialize=["first_row", "rows", "stripe"])
def _encode_kernel(
    x, to, first_row, rows, width, halves, stripe, row_bytes, scales_at,
    CODEC: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the stripe from first_row on, encoded."""
    send_parts(
        x, to, tl.program_id(0), first_row, 0, rows, width, halves, stripe, row_bytes, scales_at,
        CODEC, GROUP, ROWS, CHUNK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rank", "residual_row", "rows", "stripe"])
def _add_up_kernel(
    x, residual, weight, y, total, eps, parts, sums, rank, residual_row,
    rows, width, halves, stripe, row_bytes, scales_at,
    RANKS: tl.constexpr, TARGETS: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr,
    WITH_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the own stripe, whose sum, encoded, goes to `sums` if TARGETS is 1."""
    add_up(
        x, residual, weight, y, total, eps, parts, (sums,), 0, rank, residual_row, tl.program_id(0),
        rows, width, halves, stripe, row_bytes, scales_at,
        RANKS, TARGETS, CODEC, GROUP, WITH_NORM, HAS_RESIDUAL, ROWS, CHUNK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_row", "rows", "stripe"])
def _collect_kernel(
    y, sums, first_row, rows, width, halves, stripe, row_bytes, scales_at,
    CODEC: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: a tile of another rank's stripe, decoded."""
    collect(
        y, sums, tl.program_id(0), first_row, rows, width, halves, stripe, row_bytes, scales_at,
        CODEC, GROUP, ROWS, CHUNK,
    )  # fmt: skip


def copied_sum_add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, codec: str, group_size: int,
    memory: BulkMemory,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`triton_bulk.bulk_sum_add_rms_norm`, the same bits; see `copies_reach`."""
    call = CopiedSum(x, residual, weight, eps, codec, group_size, memory)
    call.send()
    call.meet()
    call.add_up()
    call.meet()
    call.collect()
    return call.y, call.total


def copies_reach(memory: BulkMemory) -> bool:
    """Whether the copy engines can write to the others' memories: where these are known as tensors."""
    return bool(memory.views)


class CopiedSum:
    """A sum with residual and norm, step by step; tests play several ranks in one process."""

    def __init__(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, codec: str, group_size: int,
        memory: BulkMemory,
    ) -> None:  # fmt: skip
        assert x.is_contiguous() and (residual is None or residual.is_contiguous())
        assert weight.dtype == x.dtype
        self.x, self.residual, self.weight, self.eps = x, residual, weight, eps
        self.memory, self.rank, self.ranks = memory, memory.rank, memory.ranks
        (self.rows, self.width), self.layout = x.shape, row_layout(x.shape[1], x.dtype, codec, group_size)
        self.stripe = triton.cdiv(self.rows, self.ranks)
        assert self.ranks * self.stripe * self.layout.bytes <= memory.capacity, "see rows_that_fit"
        self.as_they_are = codec == "none" and self.layout.bytes == self.width * x.itemsize
        """Whether rows travel as they lie in x and y: else they are encoded into `staged` before."""
        self.how = {"CODEC": CODES[codec], "GROUP": group_size, "ROWS": ROWS, "CHUNK": CHUNK}
        self.y = torch.empty_like(x)
        self.total = x.new_empty((self.stripe, self.width), dtype=torch.float32)
        self.staged = None
        if not self.as_they_are:
            self.staged = x.new_empty((self.stripe, self.layout.bytes), dtype=torch.uint8)
        self.parts_at = flag_bytes(self.ranks)
        self.sums_at = self.parts_at + memory.capacity

    def send(self) -> None:
        """This rank's parts of the others' stripes, to their owners."""
        for other in range(self.ranks - 1):
            owner = self._after(other)
            if self._rows_of(owner) and self.staged is not None:
                self._launch(_encode_kernel, self.x, self.staged.data_ptr(), owner * self.stripe)
            self._copy(self._of(self.x, owner), other, self.parts_at, self.rank)

    def meet(self) -> None:
        """Wait until all ranks have come so far."""
        m = self.memory
        with torch.cuda.device_of(self.x):
            launched = _meet_kernel[(1,)](
                self.rank, m.peers, m.epochs, m.error, m.limit,
                RANKS=self.ranks, CODE=CODE, FLAGS=4 * PROGRAMS, FLAG=FLAG, num_warps=1,
            )  # fmt: skip
        let_others_beside(launched)

    def add_up(self) -> None:
        """The own stripe, and send it to the others."""
        row_bytes, first = self.layout.bytes, self.rank * self.stripe
        whole = self.residual is not None and self.residual.shape[0] == self.rows
        sums = 0 if self.staged is None else self.staged.data_ptr() - first * row_bytes
        with torch.cuda.device_of(self.x):
            launched = _add_up_kernel[(triton.cdiv(self.stripe, ROWS),)](
                self.x, self.residual, self.weight, self.y, self.total, self.eps,
                self.memory.peers[-1] + self.parts_at, sums, self.rank, first if whole else 0,
                self.rows, self.width, (self.width + 1) // 2, self.stripe, row_bytes, self.layout.scales,
                RANKS=self.ranks, TARGETS=int(self.staged is not None), WITH_NORM=True,
                HAS_RESIDUAL=self.residual is not None, num_warps=4, enable_fp_fusion=False, **self.how,
            )  # fmt: skip
        let_others_beside(launched)
        for other in range(self.ranks - 1):
            self._copy(self._of(self.y, self.rank), other, self.sums_at, self.rank)

    def collect(self) -> None:
        """The others' stripes."""
        for other in range(self.ranks - 1):
            owner = self._after(other)
            if self.as_they_are:
                rows = self._of(self.y, owner)
                rows.copy_(self._place(-1, self.sums_at, owner, rows.numel()))
            elif self._rows_of(owner):
                self._launch(
                    _collect_kernel, self.y, self.memory.peers[-1] + self.sums_at, owner * self.stripe
                )

    def _launch(self, kernel: triton.JITFunction, x: Tensor, address: int, first_row: int) -> None:
        with torch.cuda.device_of(x):
            launched = kernel[(triton.cdiv(self.stripe, ROWS),)](
                x, address, first_row, self.rows, self.width, (self.width + 1) // 2, self.stripe,
                self.layout.bytes, self.layout.scales, num_warps=4, enable_fp_fusion=False, **self.how,
            )  # fmt: skip
        let_others_beside(launched)

    def _after(self, other: int) -> int:
        return (self.rank + 1 + other) % self.ranks

    def _rows_of(self, owner: int) -> int:
        """Rows of a rank's stripe that exist."""
        return max(0, min(self.stripe, self.rows - owner * self.stripe))

    def _of(self, x: Tensor, owner: int) -> Tensor:
        """The bytes that travel of x's rows of a stripe: themselves, or what is staged of them."""
        first, rows = owner * self.stripe, self._rows_of(owner)
        lying = x[first : first + rows].view(torch.uint8) if self.staged is None else self.staged[:rows]
        return lying.reshape(-1)

    def _place(self, other: int, region: int, slot: int, count: int) -> Tensor:
        """`count` bytes of the slot for a rank's stripe, in the region that begins at `region`."""
        begin = region + slot * self.stripe * self.layout.bytes
        return self.memory.views[other][begin : begin + count]

    def _copy(self, rows: Tensor, other: int, region: int, slot: int) -> None:
        if rows.numel():
            self._place(other, region, slot, rows.numel()).copy_(rows)
