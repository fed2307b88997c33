"""What the kernel of long messages does with a tile in each of its phases; see `triton_bulk`.

Arguments are those of `bulk_kernel`; `tile`: its number within a stripe.
"""

import triton
import triton.language as tl

from ssm_dist.kernels.triton_codec_tiles import (
    RUN,
    decoded,
    kept_scales,
    load_quantised,
    quantised,
    store_with_kept,
)


@triton.jit
def _tile(tile, first_row, rows, stripe, ROWS: tl.constexpr):
    """Rows of a tile within the stripe from first_row on (ROWS,), and which of them exist."""
    local = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
    return local, (local < stripe) & (first_row + local < rows)


@triton.jit
def _chunk(first, width, CHUNK: tl.constexpr):
    """Columns of the chunk that begins at `first`, and which of them exist, both (1, CHUNK)."""
    column = first + tl.arange(0, CHUNK)[None, :]
    return column, column < width


@triton.jit
def _rows_at(base, row, row_bytes):
    """Pointers to the encoded rows `row` (ROWS,) of the region at the address `base`."""
    return tl.multiple_of((base + row * row_bytes).to(tl.pointer_type(tl.uint8)), 16)


@triton.jit
def peer(peers, step, RANKS: tl.constexpr):
    """peers[step], where step is known at run time only: loops over ranks are not unrolled."""
    base = peers[0]
    for known in tl.static_range(1, RANKS):
        base = tl.where(step == known, peers[known], base)
    return base


@triton.jit
def send_parts(
    x, to, tile, first_row, slot_row, rows, width, halves, stripe, row_bytes, scales_at,
    CODEC: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Encode a tile of the stripe from first_row on, to slot_row of the region at `to`."""
    local, exists = _tile(tile, first_row, rows, stripe, ROWS)
    at = _rows_at(to, slot_row + local, row_bytes)
    kept = tl.zeros((ROWS, CHUNK // RUN), tl.float32)
    for begin in range(0, width, AHEAD * CHUNK):
        loaded = ()
        for ahead in tl.static_range(AHEAD):
            column, inside = _chunk(begin + ahead * CHUNK, width, CHUNK)
            source = x + (first_row + local)[:, None] * width + column
            loaded += (tl.load(source, mask=exists[:, None] & inside, other=0.0),)
        for ahead in tl.static_range(AHEAD):
            first = begin + ahead * CHUNK
            payload, scale = quantised(loaded[ahead].to(tl.float32), CODEC, GROUP, x.dtype.element_ty)
            kept = kept_scales(kept, scale, first, CODEC, GROUP)
            there = exists & (first < width)
            store_with_kept(at, there, payload, kept, first, width, halves, scales_at, CODEC, GROUP)


@triton.jit
def _load_parts(
    x, residual, parts, rank, local, residual_row, exists, first, width, halves, stripe, row_bytes, scales_at,
    RANKS: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """A chunk of the rows `local` of the own stripe: own part, the others' payloads and scales, residual."""
    column, inside = _chunk(first, width, CHUNK)
    inside &= exists[:, None]
    own = tl.load(x + (rank * stripe + local)[:, None] * width + column, mask=inside, other=0.0)
    sent = ()
    for other in tl.static_range(RANKS - 1):
        sender = other + (other >= rank).to(tl.int32)
        at = _rows_at(parts, sender * stripe + local, row_bytes)
        sent += (
            load_quantised(
                at, exists, first, width, halves, scales_at, CHUNK, CODEC, GROUP, x.dtype.element_ty
            ),
        )
    before = own
    if HAS_RESIDUAL:
        stream = residual + (residual_row + local)[:, None] * width + column
        before = tl.load(stream, mask=inside, other=0.0)
    return own, sent, before


@triton.jit
def _sum_of_parts(
    own, sent, before, rank, RANKS: tl.constexpr, CODEC: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):  # fmt: skip
    """What `_load_parts` returned, added up: (ROWS, CHUNK) float32."""
    own = own.to(tl.float32)
    value = own
    for other in tl.static_range(RANKS - 1):  # in rank order, and the own part in its place
        payload, scale = sent[other]
        part = decoded(payload, scale, CODEC)
        if other == 0:
            value = tl.where(rank > 1, part, own + part)
        else:
            value += part
            value = tl.where(rank == other + 1, value + own, value)
    return value + before if HAS_RESIDUAL else value


@triton.jit
def _send_sum(
    value, y, peers, sums_at, kept, row, exists, first, width, halves, row_bytes, scales_at,
    RANKS: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Encode value (ROWS, CHUNK) and store it into the others' memories; what they decode, into y.

    Returns `kept_scales`.
    """
    payload, scale = quantised(value, CODEC, GROUP, y.dtype.element_ty)
    kept = kept_scales(kept, scale, first, CODEC, GROUP)
    for step in range(RANKS - 1):
        at = _rows_at(peer(peers, step, RANKS) + sums_at, row, row_bytes)
        store_with_kept(at, exists, payload, kept, first, width, halves, scales_at, CODEC, GROUP)
    column, inside = _chunk(first, width, payload.shape[1])
    own = decoded(payload, scale, CODEC).to(y.dtype.element_ty)
    tl.store(y + row[:, None] * width + column, own, mask=exists[:, None] & inside)
    return kept


@triton.jit
def add_up(
    x, residual, weight, y, total, eps, parts, peers, sums_at, rank, residual_row, tile,
    rows, width, halves, stripe, row_bytes, scales_at,
    RANKS: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr, WITH_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, AHEAD: tl.constexpr,
    NORM_AHEAD: tl.constexpr,
):  # fmt: skip
    """Sum a tile of the own stripe, in x and at `parts`; norm it, if asked; send."""
    local, exists = _tile(tile, rank * stripe, rows, stripe, ROWS)
    row = rank * stripe + local
    squares = tl.zeros((ROWS,), tl.float32)
    kept = tl.zeros((ROWS, CHUNK // RUN), tl.float32)
    for begin in range(0, width, AHEAD * CHUNK):
        loaded = ()
        for ahead in tl.static_range(AHEAD):
            loaded += (
                _load_parts(
                    x, residual, parts, rank, local, residual_row, exists, begin + ahead * CHUNK, width,
                    halves, stripe, row_bytes, scales_at, RANKS, CODEC, GROUP, HAS_RESIDUAL, CHUNK,
                ),
            )  # fmt: skip
        for ahead in tl.static_range(AHEAD):
            own, sent, before = loaded[ahead]
            value = _sum_of_parts(own, sent, before, rank, RANKS, CODEC, HAS_RESIDUAL)
            first = begin + ahead * CHUNK
            if WITH_NORM:
                column, inside = _chunk(first, width, CHUNK)
                inside &= exists[:, None]
                tl.store(total + local[:, None] * width + column, value, mask=inside)
                squares += tl.sum(value * value, 1)
            else:
                kept = _send_sum(
                    value, y, peers, sums_at, kept, row, exists & (first < width), first, width, halves,
                    row_bytes, scales_at, RANKS, CODEC, GROUP,
                )  # fmt: skip
    if WITH_NORM:
        tl.debug_barrier()  # `total` may be read back by other threads
        norm = tl.rsqrt(squares / width + eps)
        for begin in range(0, width, NORM_AHEAD * CHUNK):
            loaded = ()
            for ahead in tl.static_range(NORM_AHEAD):
                column, inside = _chunk(begin + ahead * CHUNK, width, CHUNK)
                inside &= exists[:, None]
                value = tl.load(total + local[:, None] * width + column, mask=inside, other=0.0)
                # for every row anew, as the tile has its numbers: no other thread's are needed
                factor = tl.load(weight + tl.broadcast_to(column, inside.shape), mask=inside, other=0.0)
                loaded += ((value, factor),)
            for ahead in tl.static_range(NORM_AHEAD):
                value, factor = loaded[ahead]
                first = begin + ahead * CHUNK
                kept = _send_sum(
                    value * norm[:, None] * factor.to(tl.float32), y, peers, sums_at, kept, row,
                    exists & (first < width), first, width, halves, row_bytes, scales_at,
                    RANKS, CODEC, GROUP,
                )  # fmt: skip


@triton.jit
def collect(
    y, sums, tile, first_row, rows, width, halves, stripe, row_bytes, scales_at,
    CODEC: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Decode a tile of the stripe that begins at first_row, from the region at `sums`."""
    DTYPE: tl.constexpr = y.dtype.element_ty
    local, exists = _tile(tile, first_row, rows, stripe, ROWS)
    at = _rows_at(sums, first_row + local, row_bytes)
    for begin in range(0, width, AHEAD * CHUNK):
        loaded = ()
        for ahead in tl.static_range(AHEAD):
            first = begin + ahead * CHUNK
            loaded += (
                load_quantised(at, exists, first, width, halves, scales_at, CHUNK, CODEC, GROUP, DTYPE),
            )
        for ahead in tl.static_range(AHEAD):
            payload, scale = loaded[ahead]
            column, inside = _chunk(begin + ahead * CHUNK, width, CHUNK)
            to = y + (first_row + local)[:, None] * width + column
            tl.store(to, decoded(payload, scale, CODEC).to(DTYPE), mask=exists[:, None] & inside)
