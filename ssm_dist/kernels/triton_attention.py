"""Triton kernels of paged attention, for heads of any size (Zamba's 464: tiles of 512, the rest masked).

New keys and values go to their pages first; attention then reads nothing but pages, in one of two forms:

- many queries a sequence: a program holds a chunk of queries of one sequence and head, and walks over their
  context with tensor-core products and an online softmax (arXiv 2205.14135). Programs of one head run next to
  each other, so that its keys and values come from the L2 cache. On Hopper, `gluon_attention` does the same;
- few: a program holds one query and walks over a part of its context, so that few sequences still keep every
  multiprocessor reading; a second kernel joins the parts.

Both are right for every ragged batch; sizes known to the host choose between them.
"""

from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.kernels import backend, tuning
from ssm_dist.kernels.dependent_launch import launch_options, start_next, wait_for_inputs
from ssm_dist.kernels.gluon_support import gluon_module
from ssm_dist.kernels.operators import operator
from ssm_dist.kernels.triton_common import LOG2_E, chunk_of_program, exp2, factor, sequence_of

PROGRAMS = 528
"""Of few queries, 4 a multiprocessor: each has asked for STAGES - 1 times BLOCK_N tokens of context ahead."""
PART = {"BLOCK_N": 8, "STAGES": 4, "num_warps": 2}
MOST_PARTS = 256
JOINED = 128
"""Numbers of a head that one joining program sums."""
STORING = 4096
"""Tokens and heads from which on one program stores several of them."""


@triton.jit
def _row_of(pages, sequence, table_row, place, here, page_stride, row_stride, PAGE: tl.constexpr):
    """Where tokens of a sequence lie in the pages; places that are not `here` are not looked up."""
    page = tl.load(pages + sequence * table_row + place // PAGE, mask=here, other=0).to(tl.int64)
    return page * page_stride + (place % PAGE) * row_stride


@triton.jit
def _store_kernel(
    key, value, key_pages, value_pages, seq_offsets, positions, pages,
    key_row, key_head, value_row, value_head, page_stride, row_stride, head_stride, table_row,
    sequences, heads, size,
    PAGE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: HEADS heads of one new token, into its page."""
    start_next(PDL)
    wait_for_inputs(PDL)
    blocks = tl.cdiv(heads, HEADS)
    token, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * HEADS
    sequence = sequence_of(seq_offsets, sequences, token, BLOCK_S)
    place = tl.load(positions + token).to(tl.int32)
    row = _row_of(pages, sequence, table_row, place, True, page_stride, row_stride, PAGE)
    head, n = (first + tl.arange(0, HEADS))[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (n < size)
    token = token.to(tl.int64)
    k = tl.load(key + token * key_row + head * key_head + n, mask=inside)
    v = tl.load(value + token * value_row + head * value_head + n, mask=inside)
    at = row + head * head_stride + n
    tl.store(key_pages + at, k.to(key_pages.dtype.element_ty), mask=inside)
    tl.store(value_pages + at, v.to(value_pages.dtype.element_ty), mask=inside)


@triton.jit
def _chunk_kernel(
    query, key_pages, value_pages, y, seq_offsets, positions, pages, scale,
    query_row, query_head, page_stride, row_stride, head_stride, table_row,
    sequences, heads, size,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one sequence and head; the last chunks see most and start first."""
    chunks = tl.num_programs(0) // heads
    head, chunk = tl.program_id(0) // chunks, chunks - 1 - tl.program_id(0) % chunks
    sequence, _, end, first = chunk_of_program(seq_offsets, sequences, chunk, BLOCK_M, BLOCK_S)
    if first >= end:
        return
    # Offsets within the chunk fit in 32 bits; in 64 they would cost the registers that the sums need.
    query += first.to(tl.int64) * query_row + head * query_head
    y += (first.to(tl.int64) * heads + head) * size
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK)
    inside = (n < size)[None, :]
    mine = m < end - first
    place = tl.load(positions + first + m, mask=mine, other=0).to(tl.int32)
    q = tl.load(query + m[:, None] * query_row + n[None, :], mask=mine[:, None] & inside, other=0.0)
    context = tl.max(place, 0) + 1

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    for begin in range(0, context, BLOCK_N):
        seen = begin + tl.arange(0, BLOCK_N)
        here = seen < context
        row = _row_of(pages, sequence, table_row, seen, here, page_stride, row_stride, PAGE)
        cell = (row + head * head_stride)[:, None] + n[None, :]
        k = tl.load(key_pages + cell, mask=here[:, None] & inside, other=0.0).to(q.dtype)
        scores = tl.dot(factor(q), factor(tl.trans(k)), input_precision=PRECISION) * (scale * LOG2_E)
        # Every row has its first block's first token, so that no maximum stays at minus infinity.
        scores = tl.where(seen[None, :] <= place[:, None], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shares = exp2(scores - higher[:, None])
        fade = exp2(top - higher)
        v = tl.load(value_pages + cell, mask=here[:, None] & inside, other=0.0).to(q.dtype)
        total = total * fade + tl.sum(shares, 1)
        acc = tl.dot(factor(shares.to(q.dtype)), factor(v), acc * fade[:, None], input_precision=PRECISION)
        top = higher
    cell = m[:, None] * (heads * size) + n[None, :]
    tl.store(y + cell, (acc / total[:, None]).to(y.dtype.element_ty), mask=mine[:, None] & inside)


@triton.jit
def _part_length(context, count, BLOCK_N: tl.constexpr):
    """Tokens of each part of a context; the last may have fewer, and parts that nothing is left for none."""
    return tl.cdiv(tl.cdiv(context, count), BLOCK_N) * BLOCK_N


@triton.jit
def _part_kernel(
    query, key_pages, value_pages, y, sums, tops, totals, seq_offsets, positions, pages, scale,
    query_row, query_head, page_stride, row_stride, head_stride, table_row, sequences, heads, size, count,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, ALONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: one query and head over one of several parts of its context; ALONE: over all of it."""
    start_next(PDL)
    wait_for_inputs(PDL)
    head, rest = tl.program_id(0) % heads, tl.program_id(0) // heads
    part, token = rest % count, rest // count
    context = tl.load(positions + token).to(tl.int32) + 1
    length = _part_length(context, count, BLOCK_N)
    if part * length >= context:
        return
    sequence = sequence_of(seq_offsets, sequences, token, BLOCK_S)
    end = tl.minimum(part * length + length, context)
    n = tl.arange(0, BLOCK)
    inside = n < size
    q = tl.load(query + token.to(tl.int64) * query_row + head * query_head + n, mask=inside, other=0.0)
    q = q.to(tl.float32) * (scale * LOG2_E)

    top = tl.max(tl.full((BLOCK_N,), float("-inf"), tl.float32), 0)
    total = tl.sum(tl.zeros((BLOCK_N,), tl.float32), 0)
    acc = tl.zeros((BLOCK,), tl.float32)
    for begin in tl.range(part * length, end, BLOCK_N, num_stages=STAGES):
        seen = begin + tl.arange(0, BLOCK_N)
        here = seen < end
        row = _row_of(pages, sequence, table_row, seen, here, page_stride, row_stride, PAGE)
        cell = (row + head * head_stride)[:, None] + n[None, :]
        k = tl.load(key_pages + cell, mask=here[:, None] & inside[None, :], other=0.0)
        v = tl.load(value_pages + cell, mask=here[:, None] & inside[None, :], other=0.0)
        scores = tl.where(here, tl.sum(q[None, :] * k.to(tl.float32), 1), float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        shares = exp2(scores - higher)
        fade = exp2(top - higher)
        total = total * fade + tl.sum(shares, 0)
        acc = acc * fade + tl.sum(shares[:, None] * v.to(tl.float32), 0)
        top = higher
    item = token.to(tl.int64) * heads + head
    if ALONE:
        tl.store(y + item * size + n, (acc / total).to(y.dtype.element_ty), mask=inside)
    else:
        tl.store(sums + (item * count + part) * size + n, acc, mask=inside)
        tl.store(tops + item * count + part, top)
        tl.store(totals + item * count + part, total)


@triton.jit
def _join_kernel(
    sums, tops, totals, y, positions, heads, size, count,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK numbers of one query and head, from all parts, of which there are at most PARTS."""
    start_next(PDL)
    wait_for_inputs(PDL)
    blocks = tl.cdiv(size, BLOCK)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    context = tl.load(positions + item // heads).to(tl.int32) + 1
    used = tl.cdiv(context, _part_length(context, count, BLOCK_N))
    every = tl.arange(0, PARTS)
    all_tops = tl.load(tops + item * count + every, mask=every < used, other=float("-inf"))
    highest = tl.max(all_tops, 0)
    all_totals = tl.load(totals + item * count + every, mask=every < used, other=0.0)
    total = tl.sum(exp2(all_tops - highest) * all_totals, 0)
    acc = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, used, BLOCK_P):
        part = begin + tl.arange(0, BLOCK_P)
        some, here = item * count + part, part < used
        weights = exp2(tl.load(tops + some, mask=here, other=float("-inf")) - highest)
        inside = here[:, None] & (n < size)[None, :]
        values = tl.load(sums + some[:, None] * size + n[None, :], mask=inside, other=0.0)
        acc += tl.sum(weights[:, None] * values, 0)
    tl.store(y + item * size + n, (acc / total).to(y.dtype.element_ty), mask=n < size)


@backend.register("paged_attention", "triton")
@operator("paged_attention", mutates=("key_pages", "value_pages"))
def paged_attention(
    query: Tensor, key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor,
    seq_offsets: Tensor, positions: Tensor, pages: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """`ssm_dist.kernels.paged_attention`; heads must be contiguous, both pages in the same strides."""
    assert all(t.stride(-1) == 1 for t in (query, key, value, key_pages, value_pages, pages))
    assert key_pages.stride() == value_pages.stride()
    y = query.new_empty(query.shape)
    if not query.shape[0]:
        return y
    (tokens, heads, size), sequences = query.shape, pages.shape[0]
    of_pages = (*key_pages.stride()[:3], pages.stride(0), sequences, heads, size)
    blocks = {"PAGE": key_pages.shape[1], "BLOCK": max(16, triton.next_power_of_2(size))}
    few = {"BLOCK_S": min(triton.next_power_of_2(sequences), 256), **launch_options(query.device)}
    together = 1 if tokens * heads <= STORING else min(4, triton.next_power_of_2(heads))
    with torch.cuda.device_of(query):
        _store_kernel[(tokens * triton.cdiv(heads, together),)](
            key, value, key_pages, value_pages, seq_offsets, positions, pages,
            key.stride(0), key.stride(1), value.stride(0), value.stride(1), *of_pages, HEADS=together,
            **blocks, **few, num_warps=2 * together,
        )  # fmt: skip
        walk = (query, key_pages, value_pages, y)
        where = (seq_offsets, positions, pages, scale, query.stride(0), query.stride(1), *of_pages)
        if tokens <= sequences:
            _attend_in_parts(walk, where, blocks | few)
        elif gluon := _gluon_form(query, key_pages, value_pages):
            gluon.attend_in_chunks(walk, where, blocks, sequences)
        else:
            _attend_in_chunks(walk, where, blocks, sequences)
    return y


def _gluon_form(query: Tensor, key_pages: Tensor, value_pages: Tensor) -> ModuleType | None:
    """For many queries on Hopper: 16-bit heads of 33 to 512 numbers, 16 of which divide all strides.

    That is what the compiler is told of sizes, and asks for to copy 16 bytes at a time.
    """
    gluon = gluon_module("gluon_attention", query.device)
    alike = query.element_size() == 2 and query.dtype == key_pages.dtype == value_pages.dtype
    even = all(
        t.data_ptr() % 16 == 0 and not any(n % 16 for n in (*t.stride()[:-1], t.shape[-1]))
        for t in (query, key_pages, value_pages)
    )
    return gluon if alike and even and 32 < query.shape[-1] <= 512 else None


def _attend_in_chunks(
    walk: tuple[Tensor, ...], where: tuple[object, ...], blocks: dict[str, int], sequences: int
) -> None:
    """The form for many queries."""
    query = walk[0]
    tokens, heads, _ = query.shape
    config = tuning.configuration("paged_attention", query.element_size(), query.device)
    # A warp's width of sequences at once: more would need registers that the sums need.
    block = min(triton.next_power_of_2(sequences), 32)
    _chunk_kernel[((tokens // config["BLOCK_M"] + sequences) * heads,)](
        *walk, *where, **blocks, **config, BLOCK_S=block, enable_fp_fusion=True,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
    )  # fmt: skip


def _attend_in_parts(walk: tuple[Tensor, ...], where: tuple[object, ...], blocks: dict[str, int]) -> None:
    """The form for few queries, and the joining of its parts."""
    query, _, _, y = walk
    tokens, heads, size = query.shape
    parts = max(1, min(MOST_PARTS, PROGRAMS // (tokens * heads)))
    kept = parts if parts > 1 else 0
    sums = query.new_empty((tokens, heads, kept, size), dtype=torch.float32)
    tops, totals = query.new_empty((2, tokens, heads, kept), dtype=torch.float32)
    _part_kernel[(tokens * heads * parts,)](
        *walk, sums, tops, totals, *where, parts, ALONE=parts == 1, **PART, **blocks, enable_fp_fusion=True
    )
    if parts > 1:
        most = triton.next_power_of_2(parts)
        _join_kernel[(tokens * heads * triton.cdiv(size, JOINED),)](
            sums, tops, totals, y, where[1], heads, size, parts, PARTS=most, BLOCK=JOINED,
            BLOCK_P=min(most, 32), BLOCK_N=PART["BLOCK_N"], num_warps=4, enable_fp_fusion=True,
            **launch_options(query.device),
        )  # fmt: skip
