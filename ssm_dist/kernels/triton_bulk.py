"""Sums of long messages over shared memory, in two shots, with a codec, plain or with residual and norm.

Every rank owns a stripe of the rows. In three phases: a rank encodes the others' stripes of its rows and
stores each into its owner's memory; the owner decodes what they sent, adds it and its own part up in float32
in rank order, and stores the encoded sum into the others' memories; they decode it. With a norm, the owner
adds its rows of the residual stream in between, keeps them, and sends the normed rows: the residual stays
split over the ranks. An owner's own part is not encoded; its sum is decoded where it is made from what it
sends, so that the bits of all ranks agree.

Programs work in rounds, that the link and the memory are both busy. Program p of g takes the tiles p, p + g,
p + 2 g, ... of every stripe, on all ranks. In step s it sends its parts of its tile s, adds up tile s - 1 and
collects tile s - 2: what has just come is still in the cache. A program waits for the programs p of the
others alone, by one flag of each, which counts the steps that they have done; its own count is in its
device's memory. Steps are as many on all ranks, whatever tiles a call has; a program that a call has no tile
for counts on no rank.

Why nothing is overwritten before it was read: within a call, every place is written once. A flag is raised
after all reads and stores of its step, and a step adds up and collects only once the others' flags stand at
the steps before it. So a program ends when those of the others have added up all that it sent them: a rank
that begins a call, its kernel before being over, may send parts, whatever program, place and shape. And a
rank stores sums only once all others have flagged a step of this call: their kernel before, and with it all
that it collected, is over. So regions of fixed places, one for parts and one for sums, need no second copy,
whatever the shapes and codecs of successive calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ssm_dist.kernels import tuning
from ssm_dist.kernels.carveout import let_others_beside
from ssm_dist.kernels.codecs import RowLayout, row_layout
from ssm_dist.kernels.triton_bulk_kernel import bulk_kernel
from ssm_dist.kernels.triton_codec_tiles import CHUNK, CODES, ROWS

ALL = -1
"""Phases of a kernel: all at once. Tests play several ranks in one process, one phase (0: parts are sent, 1:
added up, 2: sums are collected) of all rounds after the other."""

CODE = 192
"""What the error word says of a wait of this file that failed, besides the missing rank."""

LINE = 128
"""Bytes that are stored together."""

PROGRAMS = 2048
"""At most; there are flags for so many."""


class Form(NamedTuple):
    """How a kernel of long messages is compiled."""

    programs: int
    """A multiprocessor at most; all of them are there at a time."""
    send: int
    """Chunks of a tile that are loaded before the first of them is encoded and sent, at most."""
    add: int
    """The same of parts to add up, over the ranks that sent some."""
    norm: int
    """The same of sums to norm."""
    collect: int
    """The same of sums to decode."""

    @property
    def registers(self) -> int:
        """A thread at most, so that all programs are there: one that waits must not keep out another."""
        return 65536 // (self.programs * 32 * WARPS)


WARPS = 4
"""A program: a row of a tile each."""

ALONE, WORDY, BESIDE = Form(4, 5, 5, 5, 10), Form(4, 2, 2, 2, 4), Form(8, 2, 2, 2, 4)
"""Of a kernel that may take whole multiprocessors, of one whose codec takes so many instructions that more of
them in a row are slower (fp8), and of one that leaves room for others. Latencies add up to what the link
takes, since all programs send, and wait, at the same time: so many loads are in flight. With more programs,
each has fewer rounds, and then little is sent while something is read."""


@dataclass(frozen=True)
class BulkMemory:
    """One rank's view of the memory of all."""

    rank: int
    peers: tuple[int, ...]
    """Addresses of the ranks' memories, from the next rank on around to the own."""
    epochs: Tensor
    """(PROGRAMS,) int32 on the device: steps that a program has done."""
    error: Tensor
    """What `triton_remote.error_words` made: the code of a wait that failed, if one has."""
    capacity: int
    """Bytes of each of the two regions, a multiple of 128."""
    limit: int
    """Nanoseconds that a wait may take."""

    @property
    def ranks(self) -> int:
        """How many share the memory."""
        return len(self.peers)


def bulk_bytes(ranks: int, capacity: int) -> int:
    """Bytes of a rank's memory: flags, then the two regions; the flags 0 before the first use."""
    return _flag_bytes(ranks) + 2 * capacity


def _flag_bytes(ranks: int) -> int:
    return ranks * PROGRAMS * 4


def row_bytes(layout: RowLayout) -> int:
    """Of an encoded row in memory: whole lines of it, or most stores would write parts of lines.

    Over a link they take longer. What fills a line up is not sent.
    """
    return -(-layout.bytes // LINE) * LINE


def rows_that_fit(width: int, dtype: torch.dtype, codec: str, group_size: int, memory: BulkMemory) -> int:
    """Rows that one call can sum, a multiple of the number of ranks."""
    size = row_bytes(row_layout(width, dtype, codec, group_size))
    return memory.capacity // (size * memory.ranks) * memory.ranks


def bulk_sum(
    x: Tensor, codec: str, group_size: int, memory: BulkMemory, phase: int = ALL,
    programs: int | None = None, y: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The sum of every rank's x (T, width), contiguous, in y, of its shape and dtype; see `rows_that_fit`.

    programs: at most so many, the same on all ranks, that other kernels run beside them; None: as many as
    are fast alone. The bits are the same.
    """
    if y is None:
        y = torch.empty_like(x)
    _launch(x, None, None, y, None, 0.0, codec, group_size, memory, phase, programs)
    return y


def bulk_sum_add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, codec: str, group_size: int,
    memory: BulkMemory, phase: int = ALL, programs: int | None = None,
    y: Tensor | None = None, total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`kernels.add_rms_norm` of the sum of every rank's x (T, H), the residual stream split over the ranks.

    residual: float32, whole (T, H) or this rank's stripe of ceil(T / ranks) rows; weight of x's dtype;
    programs: as in `bulk_sum`.
    Returns y (T, H), whole and alike on all ranks, and this rank's stripe of the new stream, its rows past T
    undefined.
    """
    assert weight.dtype == x.dtype
    rows, width = x.shape
    if y is None:
        y = torch.empty_like(x)
    if total is None:
        total = x.new_empty((triton.cdiv(rows, memory.ranks), width), dtype=torch.float32)
    _launch(x, residual, weight, y, total, eps, codec, group_size, memory, phase, programs)
    return y, total


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, y: Tensor, total: Tensor | None, eps: float,
    codec: str, group_size: int, memory: BulkMemory, phase: int, programs: int | None,
) -> None:  # fmt: skip
    assert x.is_contiguous() and (residual is None or residual.is_contiguous())
    rows, width = x.shape
    layout = row_layout(width, x.dtype, codec, group_size)
    stripe = triton.cdiv(rows, memory.ranks)
    assert memory.ranks * stripe * row_bytes(layout) <= memory.capacity, "more than fits: see rows_that_fit"
    whole = residual is not None and residual.shape[0] == rows
    assert residual is None or whole or residual.shape[0] == stripe
    parts_at = _flag_bytes(memory.ranks)
    form = BESIDE if programs is not None else WORDY if codec == "fp8" else ALONE
    most = min(PROGRAMS, form.programs * tuning.multiprocessors(x.device))
    grid = min(most if programs is None else min(programs, most), triton.cdiv(stripe, ROWS))
    with torch.cuda.device_of(x):
        launched = bulk_kernel[(grid,)](
            x, residual, weight, y, total, eps,
            rows, width, (width + 1) // 2, stripe, memory.rank * stripe if whole else 0,
            row_bytes(layout), layout.scales,
            memory.rank, memory.peers, memory.epochs, memory.error, memory.limit,
            parts_at, parts_at + memory.capacity,
            RANKS=memory.ranks, CODEC=CODES[codec], GROUP=group_size, WITH_NORM=weight is not None,
            HAS_RESIDUAL=residual is not None, CODE=CODE, FLAGS=4 * PROGRAMS,
            ROWS=ROWS, CHUNK=CHUNK, PHASE=phase, **aheads(form, width, memory.ranks),
            num_warps=WARPS, maxnreg=form.registers, enable_fp_fusion=False,
        )  # fmt: skip
    let_others_beside(launched)


def aheads(form: Form, width: int, ranks: int) -> dict[str, int]:
    """What the kernel takes of `form`, by name: rows of that width have their chunks dealt out evenly."""
    chunks = triton.cdiv(width, CHUNK)
    most = {
        "SEND_AHEAD": form.send, "ADD_AHEAD": form.add // max(1, ranks - 1), "NORM_AHEAD": form.norm,
        "COLLECT_AHEAD": form.collect,
    }  # fmt: skip
    return {name: triton.cdiv(chunks, triton.cdiv(chunks, max(1, n))) for name, n in most.items()}
