"""The kernel of long messages, phase by phase; see `triton_bulk`."""

import triton
import triton.language as tl

from ssm_dist.kernels.triton_codecs import decoded, load_decoded, quantised, store_quantised
from ssm_dist.kernels.triton_remote import raise_flag, wait_for_flag


@triton.jit
def _tile(tile, stripe, ROWS: tl.constexpr):
    """Rows of a tile within its stripe (ROWS,), and which of them exist there."""
    local = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
    return local, local < stripe


@triton.jit
def _rows_at(base, row, row_bytes):
    """Pointers to the encoded rows `row` (ROWS,) of the region at the address `base`."""
    return tl.multiple_of((base + row * row_bytes).to(tl.pointer_type(tl.uint8)), 16)


@triton.jit
def _peer(peers, step, RANKS: tl.constexpr):
    """peers[step], where step is known at run time only: loops over ranks are not unrolled."""
    base = peers[0]
    for known in tl.static_range(1, RANKS):
        base = tl.where(step == known, peers[known], base)
    return base


@triton.jit
def _send_parts(
    x, to, first_row, slot_row, rows, width, halves, stripe, row_bytes, scales_at,
    CODEC: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Encode this program's tiles of the stripe from first_row on, to slot_row of the region at `to`."""
    for tile in range(tl.program_id(0), tl.cdiv(stripe, ROWS), tl.num_programs(0)):
        local, exists = _tile(tile, stripe, ROWS)
        row = first_row + local
        exists &= row < rows
        at = _rows_at(to, slot_row + local, row_bytes)
        for first in range(0, width, CHUNK):
            column = first + tl.arange(0, CHUNK)
            inside = exists[:, None] & (column < width)[None, :]
            value = tl.load(x + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
            payload, scale = quantised(value, CODEC, GROUP, x.dtype.element_ty)
            store_quantised(at, exists, payload, scale, first, width, halves, scales_at, CODEC, GROUP)


@triton.jit
def _own_part(
    x, row, exists, first, width,
    CODEC: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What the others would decode of this rank's part, had it been sent to them: (ROWS, CHUNK) float32."""
    column = first + tl.arange(0, CHUNK)
    inside = exists[:, None] & (column < width)[None, :]
    value = tl.load(x + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    payload, scale = quantised(value, CODEC, GROUP, x.dtype.element_ty)
    return decoded(payload, scale, CODEC, GROUP)


@triton.jit
def _send_sum(
    value, y, peers, sums_at, row, exists, first, width, halves, row_bytes, scales_at,
    RANKS: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Encode value (ROWS, CHUNK) and store it into the others' memories; what they decode, into y."""
    payload, scale = quantised(value, CODEC, GROUP, y.dtype.element_ty)
    for step in range(RANKS - 1):
        at = _rows_at(_peer(peers, step, RANKS) + sums_at, row, row_bytes)
        store_quantised(at, exists, payload, scale, first, width, halves, scales_at, CODEC, GROUP)
    column = first + tl.arange(0, payload.shape[1])
    inside = exists[:, None] & (column < width)[None, :]
    own = decoded(payload, scale, CODEC, GROUP).to(y.dtype.element_ty)
    tl.store(y + row[:, None] * width + column[None, :], own, mask=inside)


@triton.jit
def _add_up(
    x, residual, weight, y, total, eps, parts, peers, sums_at, rank, residual_row,
    rows, width, halves, stripe, row_bytes, scales_at,
    RANKS: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr, WITH_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sum this program's tiles of the own stripe, in x and at `parts`; norm them, if asked; send."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    for tile in range(tl.program_id(0), tl.cdiv(stripe, ROWS), tl.num_programs(0)):
        local, exists = _tile(tile, stripe, ROWS)
        row = rank * stripe + local
        exists &= row < rows
        squares = tl.zeros((ROWS,), tl.float32)
        for first in range(0, width, CHUNK):
            own = _own_part(x, row, exists, first, width, CODEC, GROUP, ROWS, CHUNK)
            value = own
            for other in tl.static_range(RANKS - 1):  # in rank order, and the own part in its place
                sender = other + (other >= rank).to(tl.int32)
                at = _rows_at(parts, sender * stripe + local, row_bytes)
                part = load_decoded(at, exists, first, width, halves, scales_at, CHUNK, CODEC, GROUP, DTYPE)
                if other == 0:
                    value = tl.where(rank > 1, part, own + part)
                else:
                    value += part
                    value = tl.where(rank == other + 1, value + own, value)
            if WITH_NORM:
                column = first + tl.arange(0, CHUNK)
                inside = exists[:, None] & (column < width)[None, :]
                if HAS_RESIDUAL:
                    stream = residual + (residual_row + local)[:, None] * width + column[None, :]
                    value += tl.load(stream, mask=inside, other=0.0)
                tl.store(total + local[:, None] * width + column[None, :], value, mask=inside)
                squares += tl.sum(value * value, 1)
            else:
                _send_sum(
                    value, y, peers, sums_at, row, exists, first, width, halves, row_bytes, scales_at,
                    RANKS, CODEC, GROUP,
                )  # fmt: skip
        if WITH_NORM:
            tl.debug_barrier()  # `total` may be read back by other threads
            norm = tl.rsqrt(squares / width + eps)
            for first in range(0, width, CHUNK):
                column = first + tl.arange(0, CHUNK)
                inside = exists[:, None] & (column < width)[None, :]
                value = tl.load(total + local[:, None] * width + column[None, :], mask=inside, other=0.0)
                factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
                value = value * norm[:, None] * factor[None, :]
                _send_sum(
                    value, y, peers, sums_at, row, exists, first, width, halves, row_bytes, scales_at,
                    RANKS, CODEC, GROUP,
                )  # fmt: skip


@triton.jit
def _collect(
    y, sums, first_row, rows, width, halves, stripe, row_bytes, scales_at,
    CODEC: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Decode this program's tiles of the stripe that begins at first_row, from the region at `sums`."""
    DTYPE: tl.constexpr = y.dtype.element_ty
    for tile in range(tl.program_id(0), tl.cdiv(stripe, ROWS), tl.num_programs(0)):
        local, exists = _tile(tile, stripe, ROWS)
        row = first_row + local
        exists &= row < rows
        at = _rows_at(sums, row, row_bytes)
        for first in range(0, width, CHUNK):
            value = load_decoded(at, exists, first, width, halves, scales_at, CHUNK, CODEC, GROUP, DTYPE)
            column = first + tl.arange(0, CHUNK)
            inside = exists[:, None] & (column < width)[None, :]
            tl.store(y + row[:, None] * width + column[None, :], value.to(DTYPE), mask=inside)


# rank: the same code on all ranks, so that their bits agree; the others: nothing to gain from compiling again
@triton.jit(do_not_specialize=["rank", "residual_row", "rows", "stripe"])
def bulk_kernel(
    x, residual, weight, y, total, eps,
    rows, width, halves, stripe, residual_row, row_bytes, scales_at,
    rank, peers, epochs, error, limit, parts_at, sums_at,
    RANKS: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr, WITH_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, CODE: tl.constexpr, FLAGS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """One program: every num_programs-th tile of ROWS rows, of all stripes of `stripe` rows.

    parts_at, sums_at: offsets of the regions; residual_row: the row of `residual` that this rank's stripe
    begins at; FLAGS: bytes of a rank's flags of one phase; PHASE: ALL, or one of them. The rest: see
    `BulkMemory` and `triton_codecs`.
    """
    program = tl.program_id(0)
    epoch = tl.load(epochs + program) + 1
    failed, own = error.to(tl.int64), peers[RANKS - 1]

    if PHASE <= 0:
        for step in range(RANKS - 1):
            _send_parts(
                x, _peer(peers, step, RANKS) + parts_at, (rank + 1 + step) % RANKS * stripe, rank * stripe,
                rows, width, halves, stripe, row_bytes, scales_at, CODEC, GROUP, ROWS, CHUNK,
            )  # fmt: skip
        tl.debug_barrier()
        for step in range(RANKS - 1):
            raise_flag(_peer(peers, step, RANKS) + rank * FLAGS + program * 4, epoch)
    if PHASE < 0 or PHASE == 1:
        for step in range(RANKS - 1):
            sender = (rank + 1 + step) % RANKS
            wait_for_flag(own + sender * FLAGS + program * 4, epoch, failed, limit, CODE + sender)
        tl.debug_barrier()
        _add_up(
            x, residual, weight, y, total, eps, own + parts_at, peers, sums_at, rank, residual_row,
            rows, width, halves, stripe, row_bytes, scales_at,
            RANKS, CODEC, GROUP, WITH_NORM, HAS_RESIDUAL, ROWS, CHUNK,
        )  # fmt: skip
        tl.debug_barrier()
        for step in range(RANKS - 1):
            raise_flag(_peer(peers, step, RANKS) + (RANKS + rank) * FLAGS + program * 4, epoch)
    if PHASE < 0 or PHASE == 2:
        for step in range(RANKS - 1):
            sender = (rank + 1 + step) % RANKS
            flag = own + (RANKS + sender) * FLAGS + program * 4
            wait_for_flag(flag, epoch, failed, limit, CODE + sender)
            tl.debug_barrier()
            _collect(
                y, own + sums_at, sender * stripe, rows, width, halves, stripe, row_bytes, scales_at,
                CODEC, GROUP, ROWS, CHUNK,
            )  # fmt: skip
        tl.store(epochs + program, epoch)
