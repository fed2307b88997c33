"""Sums of long messages over shared memory, in two shots, with a codec, plain or with residual and norm.

Every rank owns a stripe of the rows. In three phases: a rank encodes the others' stripes of its rows and
stores each into its owner's memory; the owner decodes what they sent, adds it and its own part up in float32
in rank order, and stores the encoded sum into the others' memories; they decode it. With a norm, the owner
adds its rows of the residual stream in between, keeps them, and sends the normed rows: the residual stays
split over the ranks. An owner's own part is not encoded; its sum is decoded where it is made from what it
sends, so that the bits of all ranks agree.

Programs work in rounds, that the link and the memory are both busy. Program p of g takes the tiles p, p + g,
p + 2 g, ... of every stripe, on all ranks. In step s it sends its parts of its tile s, adds up tile s - 1 and
collects tile s - 2: what has just come is still in the cache. Without a norm, half of the programs send last
in their steps, so that the link is not idle while all collect. A program waits for the programs p of the
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

import torch
import triton
from torch import Tensor

from ssm_dist.kernels.carveout import let_others_beside
from ssm_dist.kernels.codecs import row_layout
from ssm_dist.kernels.triton_bulk_kernel import bulk_kernel
from ssm_dist.kernels.triton_codec_tiles import CHUNK, CODES, ROWS

ALL = -1
"""Phases of a kernel: all at once. Tests play several ranks in one process, one phase (0: parts are sent, 1:
added up, 2: sums are collected) of all rounds after the other."""

CODE = 192
"""What the error word says of a wait of this file that failed, besides the missing rank."""

PROGRAMS = 2048
"""At most; there are flags for so many."""

PROGRAMS_A_MULTIPROCESSOR = 8
"""So many are there at a time: a program that waits must not keep out those that it waits for."""

CHOSEN_A_MULTIPROCESSOR = 4
"""Unless told otherwise. More would have fewer rounds, and then little is sent while something is read."""

MOST_REGISTERS = 64
"""A thread, so that they are: 65536 a multiprocessor for 8 programs of 128 threads."""


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
    """Bytes of each of the two regions, a multiple of 16."""
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


def rows_that_fit(width: int, dtype: torch.dtype, codec: str, group_size: int, memory: BulkMemory) -> int:
    """Rows that one call can sum, a multiple of the number of ranks."""
    return (
        memory.capacity // (row_layout(width, dtype, codec, group_size).bytes * memory.ranks) * memory.ranks
    )


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
    assert memory.ranks * stripe * layout.bytes <= memory.capacity, "more than fits: see rows_that_fit"
    whole = residual is not None and residual.shape[0] == rows
    assert residual is None or whole or residual.shape[0] == stripe
    parts_at = _flag_bytes(memory.ranks)
    multiprocessors = _multiprocessors(x.device)
    wanted = CHOSEN_A_MULTIPROCESSOR * multiprocessors if programs is None else programs
    grid = min(wanted, PROGRAMS, triton.cdiv(stripe, ROWS), PROGRAMS_A_MULTIPROCESSOR * multiprocessors)
    with torch.cuda.device_of(x):
        launched = bulk_kernel[(grid,)](
            x, residual, weight, y, total, eps,
            rows, width, (width + 1) // 2, stripe, memory.rank * stripe if whole else 0,
            layout.bytes, layout.scales,
            memory.rank, memory.peers, memory.epochs, memory.error, memory.limit,
            parts_at, parts_at + memory.capacity,
            RANKS=memory.ranks, CODEC=CODES[codec], GROUP=group_size, WITH_NORM=weight is not None,
            HAS_RESIDUAL=residual is not None, CODE=CODE, FLAGS=4 * PROGRAMS,
            ROWS=ROWS, CHUNK=CHUNK, PHASE=phase,
            num_warps=4, maxnreg=MOST_REGISTERS, enable_fp_fusion=False,
        )  # fmt: skip
    let_others_beside(launched)


def _multiprocessors(device: torch.device) -> int:
    """Of the device; the interpreter's programs take turns."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
