"""Attention of many queries over pages of keys and values (Gluon, sm_90, heads of 16-bit numbers).

The algorithm is that of `triton_attention`: a program holds a chunk of queries of one sequence and head, and
walks over their context with an online softmax (arXiv 2205.14135). Here the layouts are chosen by hand, since
wide heads leave no room: 64 queries of 512 numbers, and as many keys and values, fill shared memory, and the
sums take half of all registers. So each of the two warpgroups computes half of the scores and half of the
output's columns, and the shares pass between them; and keys and values have one buffer each, where the next
ones are copied, 16 bytes at a time, as soon as the product with the last ones is over.

What bounds it is the L2 cache, which gives a multiprocessor about 45 bytes a nanosecond: 64 queries ask for
two bytes for every 128 operations, which makes 380 TFLOP/s.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ssm_dist.kernels.triton_common import LOG2_E

CHUNK = 64
"""Queries of a program, and keys that it looks at together."""
LANES = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))
"""A vector of 32 that every warp holds."""


@gluon.jit
def _chunk_of_program(seq_offsets, sequences, program, CHUNK: gl.constexpr):
    """As `triton_common.chunk_of_program`: the sequence, its end, and the first token of the chunk."""
    sequence, start, end = -1, 0, 0
    for base in range(0, sequences, 32):
        s = base + gl.arange(0, 32, LANES)
        starts = gl.load(seq_offsets + s, mask=s < sequences, other=0)
        ends = gl.load(seq_offsets + s + 1, mask=s < sequences, other=0)
        before = (s < sequences) & (starts // CHUNK + s <= program)
        sequence += gl.sum(before.to(gl.int32), 0)
        start = gl.maximum(start, gl.max(gl.where(before, starts, 0), 0))
        end = gl.maximum(end, gl.max(gl.where(before, ends, 0), 0))
    return sequence, end, start + (program - start // CHUNK - sequence) * CHUNK


@gluon.jit
def _pages_of(seen, pages, context, PAGE: gl.constexpr):
    """The pages of tokens; of those past the context, some page."""
    return gl.load(pages + seen // PAGE, mask=seen < context, other=0)


@gluon.jit
def _rows_of(seen, page, page_stride, row_stride, PAGE: gl.constexpr):
    """Where tokens lie in their pages; 64 bits, which would take twice the registers of `page` to keep."""
    return page.to(gl.int64) * page_stride + (seen % PAGE) * row_stride


@gluon.jit
def _copy(source, row, here, size, into, COPY: gl.constexpr, BLOCK: gl.constexpr):
    """Begin to copy rows of `size` numbers, zeros in the place of those that are not `here`."""
    n = gl.arange(0, BLOCK, gl.SliceLayout(0, COPY))
    cell = row[:, None] + n[None, :]
    async_copy.async_copy_global_to_shared(into, source + cell, mask=here[:, None] & (n < size)[None, :])
    async_copy.commit_group()


@gluon.jit
def chunk_kernel(
    query, key_pages, value_pages, y, seq_offsets, positions, pages, scale,
    query_row, query_head, page_stride, row_stride, head_stride, table_row, sequences, heads, size,
    PAGE: gl.constexpr, BLOCK: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """One program: M = 64 queries of one sequence and head. The last chunks, which see most, start first."""
    WIDE: gl.constexpr = min(BLOCK // 8, 32)
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [32 // WIDE, WIDE], [8, 1], [1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, COPY)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, N // 2, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK // 2, 16])
    OF_SCORES: gl.constexpr = gl.SliceLayout(1, SCORES)
    OF_SUMS: gl.constexpr = gl.SliceLayout(1, SUMS)

    chunks = gl.num_programs(0) // heads
    head = gl.program_id(0) // chunks
    chunk = chunks - 1 - gl.program_id(0) % chunks
    sequence, end, first = _chunk_of_program(seq_offsets, sequences, chunk, M)
    if first >= end:
        return
    pages += sequence * table_row
    key_pages += head * head_stride
    value_pages += head * head_stride
    count = gl.minimum(end - first, M)
    place = gl.load(positions + first).to(gl.int32)
    context = gl.load(positions + first + count - 1).to(gl.int32) + 1

    dtype: gl.constexpr = query.dtype.element_ty
    Q = gl.allocate_shared_memory(dtype, [M, BLOCK], SHARED)
    K = gl.allocate_shared_memory(dtype, [N, BLOCK], SHARED)
    V = gl.allocate_shared_memory(dtype, [N, BLOCK], SHARED)
    m = gl.arange(0, M, ROWS)
    query += first.to(gl.int64) * query_row + head * query_head
    _copy(query, m * query_row, m < count, size, Q, COPY, BLOCK)
    each = gl.arange(0, N, ROWS)
    seen = each
    row = _rows_of(seen, _pages_of(seen, pages, context, PAGE), page_stride, row_stride, PAGE)
    _copy(key_pages, row, seen < context, size, K, COPY, BLOCK)
    _copy(value_pages, row, seen < context, size, V, COPY, BLOCK)
    page = _pages_of(N + each, pages, context, PAGE)

    top = gl.full([M], float("-inf"), gl.float32, OF_SCORES)
    total = gl.zeros([M], gl.float32, OF_SCORES)
    acc = gl.zeros([M, BLOCK], gl.float32, SUMS)
    column = gl.arange(0, N, gl.SliceLayout(0, SCORES))
    last = place + gl.arange(0, M, OF_SCORES)
    scale *= LOG2_E
    for begin in range(0, context, N):
        async_copy.wait_group(1)
        fence_async_shared()
        scores = gl.zeros([M, N], gl.float32, SCORES)
        scores = warpgroup_mma(Q, K.permute((1, 0)), scores, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores]) * scale
        seen = begin + N + each
        row = _rows_of(seen, page, page_stride, row_stride, PAGE)
        _copy(key_pages, row, seen < context, size, K, COPY, BLOCK)
        # Every row has its first block's first token, so that no maximum stays at minus infinity.
        scores = gl.where((begin + column)[None, :] <= last[:, None], scores, float("-inf"))
        higher = gl.maximum(top, gl.max(scores, 1))
        shares = gl.exp2(scores - higher[:, None])
        fade = gl.exp2(top - higher)
        total = total * fade + gl.sum(shares, 1)
        top = higher
        acc *= gl.convert_layout(fade, OF_SUMS)[:, None]
        factors = gl.convert_layout(shares.to(dtype), gl.DotOperandLayout(0, SUMS, 2))
        async_copy.wait_group(1)
        fence_async_shared()
        acc = warpgroup_mma(factors, V, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        row = _rows_of(seen, page, page_stride, row_stride, PAGE)
        _copy(value_pages, row, seen < context, size, V, COPY, BLOCK)
        page = _pages_of(seen + N, pages, context, PAGE)
    async_copy.wait_group(0)
    m = gl.arange(0, M, OF_SUMS)
    n = gl.arange(0, BLOCK, gl.SliceLayout(0, SUMS))
    y += (first.to(gl.int64) * heads + head) * size
    acc /= gl.convert_layout(total, OF_SUMS)[:, None]
    cell = m[:, None] * (heads * size) + n[None, :]
    gl.store(y + cell, acc.to(dtype), mask=(m < count)[:, None] & (n < size)[None, :])


def attend_in_chunks(
    walk: tuple[Tensor, ...], where: tuple[object, ...], blocks: dict[str, int], sequences: int
) -> None:
    """Launch `chunk_kernel` on its first arguments, and on those that follow."""
    tokens, heads, _ = walk[0].shape
    chunk_kernel[((tokens // CHUNK + sequences) * heads,)](
        *walk, *where, **blocks, M=CHUNK, N=CHUNK, num_warps=8, enable_fp_fusion=True
    )
