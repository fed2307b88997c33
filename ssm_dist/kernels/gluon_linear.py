"""Products of some rows with a small weight on Hopper, which is in registers before x is there (Gluon).

A small weight takes no time to read, but several waits in a row: for memory, for what shares a sum, for the
next kernel. Here a lane asks for its part of the weight in the very order in which the tensor cores want it,
16 bytes at a time, and holds it while it waits for the kernel before. m16n8k16 takes 16 outputs from the left
and 8 rows of x from the right. Since a sum over k may go in any order, the 8 neighbours in memory that a lane
loads count as the k that are its own, in x as well: nothing is shuffled, and nothing goes through shared
memory but the sums of the warps, which share the width.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ssm_dist.kernels import gluon_linear_form
from ssm_dist.kernels.dependent_launch import launch_options
from ssm_dist.kernels.gluon_warp import WORD, barrier, product_of_16
from ssm_dist.kernels.triton_push import PushMemory
from ssm_dist.kernels.triton_remote import EMPTY, NAN_WORD, THREAD, pushing
from ssm_dist.kernels.triton_shares import counters
from ssm_dist.kernels.tuning import Configuration

PUSH_PAIRS = gl.constexpr(
    pushing("$2", f"{THREAD} setp.ne.s32 wanted, $3, 0; setp.lt.and.u32 wanted, thread, 64, wanted;")
)
"""As `push_words`, by the first 64 threads. Copies that other threads hold must not be sent: they might come
when the word has been taken."""
STEP = gl.constexpr(gluon_linear_form.STEP)


@gluon.constexpr_function
def _lanes(warps, registers):
    """Element registers * t + r is register r of thread t."""
    return gl.DistributedLinearLayout(
        [[1 << k] for k in range(registers.bit_length() - 1)],
        [[registers << k] for k in range(5)],
        [[32 * registers << k] for k in range(warps.bit_length() - 1)],
        [],
        [32 * registers * warps],
    )


@gluon.jit
def _words(pointer, wanted, WARPS: gl.constexpr):
    """16 bytes a lane from `pointer`, four words of two numbers."""
    LANES: gl.constexpr = _lanes(WARPS, 1)
    four = gl.load(pointer, mask=wanted, other=0).reshape([32 * WARPS, 2, 2])
    even, odd = gl.split(four)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return (
        gl.convert_layout(first, LANES, assert_trivial=True),
        gl.convert_layout(second, LANES, assert_trivial=True),
        gl.convert_layout(third, LANES, assert_trivial=True),
        gl.convert_layout(fourth, LANES, assert_trivial=True),
    )


# rank: as in triton_push
@gluon.jit(do_not_specialize=["tokens", "columns", "across", "rank"])
def few_rows_kernel(
    x, weight, bias, y, parts, counters, x_row, tokens, columns, across,
    rank, peers, uses, slots, slot_bytes, unit_bytes,
    K: gl.constexpr, SHARES: gl.constexpr, EIGHTS: gl.constexpr, HAS_BIAS: gl.constexpr, PDL: gl.constexpr,
    WARPS: gl.constexpr, RANKS: gl.constexpr,
):  # fmt: skip
    """One program: 16 numbers of EIGHTS times eight rows, summed over one of SHARES spans of K.

    `across`: blocks of the columns. Programs are numbered by block of rows, block of columns and share. A
    warp takes every WARPS-th step of the span. RANKS: 0, or what is made goes to so many, and not to y; then
    rank to unit_bytes are as in `triton_push_product`, `uses` the counters there.
    """
    HALF: gl.constexpr = y.dtype.element_ty == gl.float16
    SPAN: gl.constexpr = (K + STEP * SHARES - 1) // (STEP * SHARES) * STEP
    STEPS: gl.constexpr = (SPAN + STEP * WARPS - 1) // (STEP * WARPS)
    APART: gl.constexpr = STEP * WARPS
    if PDL and RANKS == 0:
        gdc_launch_dependents()
    tile = gl.program_id(0) // SHARES
    share = gl.program_id(0) % SHARES
    begin = share * SPAN
    end = gl.minimum(begin + SPAN, K)

    word = gl.arange(0, 128 * WARPS, _lanes(WARPS, 4))
    thread = word // 4
    g = thread // 4 % 8
    k = begin + thread // 32 * STEP + thread % 4 * 8
    at = k // 2 + word % 4
    near = tile % across * 16 + g
    row = weight.to(WORD) + (gl.multiple_of(near.to(gl.int64) * (K // 2), 4) + at)
    held = ()
    for c in gl.static_range(STEPS):
        here = k + c * APART < end
        place = row + c * (APART // 2)
        held += (
            _words(place, here & (near < columns), WARPS),
            _words(place + 8 * (K // 2), here & (near + 8 < columns), WARPS),
        )
    if PDL:
        gdc_wait()
    if PDL and RANKS > 0:
        gdc_launch_dependents()  # see push_vector_kernel

    first, n0 = tile // across * (8 * EIGHTS), tile % across * 16
    places = ()
    if RANKS > 0:
        for r in gl.static_range(EIGHTS):
            token, n = _pair(first + 8 * r, n0, WARPS)
            wanted = (token < tokens) & (n < columns)
            places += (
                (_part(token, n, columns, wanted, rank, uses, slots, slot_bytes, unit_bytes, RANKS), wanted),
            )
    given = ()
    after_all = gl.zeros([32 * WARPS], gl.int32, _lanes(WARPS, 1))
    nothing = tokens >> 30
    for r in gl.static_range(EIGHTS):
        token = first + 8 * r + g
        row = x.to(WORD) + (gl.multiple_of(token.to(gl.int64) * (x_row // 2), 4) + at)
        for c in gl.static_range(STEPS):
            words = _words(row + c * (APART // 2), (k + c * APART < end) & (token < tokens), WARPS)
            after_all |= words[0] & nothing
            given += (words,)
    # Zero, which the compiler cannot know: it would ask for each input just before it is needed, and wait.
    start = after_all.to(gl.float32, bitcast=True)
    sums = ()
    for r in gl.static_range(EIGHTS):
        total = (start, start, start, start)
        for c in gl.static_range(STEPS):
            a = held[2 * c]
            far = held[2 * c + 1]
            b = given[r * STEPS + c]
            total = product_of_16((a[0], far[0], a[1], far[1]), (b[0], b[1]), total, HALF)
            total = product_of_16((a[2], far[2], a[3], far[3]), (b[2], b[3]), total, HALF)
        sums += (total,)
    _finish(sums, bias, y, parts, counters + tile, share, first, n0, tokens, columns, peers, places,
            SHARES, EIGHTS, HAS_BIAS, WARPS, RANKS)  # fmt: skip


@gluon.constexpr_function
def _pair_lanes(warps):
    """64 words, a lane each of two warps; the others hold copies, which `PUSH_PAIRS` does not send."""
    bits = warps.bit_length() - 1
    warp = [[32]] + [[0]] * (bits - 1) if bits else []
    registers = [] if bits else [[32]]
    return gl.DistributedLinearLayout(registers, [[1], [2], [4], [8], [16]], warp, [], [64])


@gluon.jit
def _pair(first, n0, WARPS: gl.constexpr):
    """Row and first output of each word of `_pairs`, (64,)."""
    word = gl.arange(0, 64, _pair_lanes(WARPS))
    return first + word // 4 % 4 * 2 + word % 2, n0 + word // 16 * 2 + word % 4 // 2 * 8


@gluon.jit
def _pairs(total, DTYPE: gl.constexpr, WARPS: gl.constexpr):
    """A tile as in `_place`, (128,) float32, as 64 words of two neighbouring outputs; never EMPTY."""
    BY_TWO: gl.constexpr = gl.BlockedLayout([1, 1, 2], [2, 16, 1], [WARPS, 1, 1], [2, 1, 0])
    low, high = gl.split(gl.convert_layout(total.reshape([4, 2, 16]).permute([0, 2, 1]), BY_TWO))
    word = low.to(DTYPE).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    word |= high.to(DTYPE).to(gl.int16, bitcast=True).to(gl.int32) << 16
    word = gl.where(word == EMPTY, NAN_WORD, word)
    return gl.convert_layout(word.reshape([64]), _pair_lanes(WARPS))


@gluon.jit
def _part(
    token, n, columns, wanted, rank, uses, slots, slot_bytes, unit_bytes, RANKS: gl.constexpr
):
    """`triton_push_product.part_of` of these numbers of 16 bits."""
    byte = (token * columns + n) * 2
    unit = byte // unit_bytes
    use = gl.load(uses + unit, mask=wanted, other=0)
    part = ((use & 1) * RANKS + rank) * (slots.to(gl.int64) * slot_bytes)
    return part + unit * slot_bytes + byte % unit_bytes


@gluon.jit
def _place(element, first, n0, tokens, columns):
    """Where a tile of 16 outputs of eight rows goes, by register r of lane 4 g + i as element 4 lane + r.

    That is output g + r // 2 * 8 of row 2 i + r % 2. Returns its number in (T, N), whether it exists, and n.
    """
    n = n0 + element // 16 + element % 4 // 2 * 8
    token = first + element // 4 % 4 * 2 + element % 2
    return token.to(gl.int64) * columns + n, (token < tokens) & (n < columns), n


@gluon.jit
def _finish(
    sums, bias, y, parts, counter, share, first, n0, tokens, columns, peers, places,
    SHARES: gl.constexpr, EIGHTS: gl.constexpr, HAS_BIAS: gl.constexpr, WARPS: gl.constexpr,
    RANKS: gl.constexpr,
):  # fmt: skip
    """Add up what the warps have, then the shares, in order, and store it, or push it to its `places`."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    ALONG: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    ACROSS: gl.constexpr = gl.BlockedLayout([WARPS, 1], [1, 32], [1, WARPS], [1, 0])
    LINE: gl.constexpr = gl.SliceLayout(0, ACROSS)
    joint = gl.allocate_shared_memory(gl.float32, [EIGHTS, WARPS, 128], FLAT)
    for r in gl.static_range(EIGHTS):
        s = sums[r]
        lanes = gl.join(gl.join(s[0], s[2]), gl.join(s[1], s[3])).reshape([WARPS, 128])
        joint.index(r).store(gl.convert_layout(lanes, ALONG))
    barrier()
    element = gl.arange(0, 128, LINE)
    size = tokens.to(gl.int64) * columns
    last = True
    if SHARES > 1:
        for r in gl.static_range(EIGHTS):
            cell, inside, _ = _place(element, first + 8 * r, n0, tokens, columns)
            gl.store(parts + share * size + cell, gl.sum(joint.index(r).load(ACROSS), 0), mask=inside)
        barrier()
        last = gl.atomic_add(counter, 1, sem="acq_rel") == SHARES - 1
    if last:
        if SHARES > 1:
            gl.store(counter, 0)
        for r in gl.static_range(EIGHTS):
            cell, inside, n = _place(element, first + 8 * r, n0, tokens, columns)
            if SHARES > 1:
                total = gl.zeros([128], gl.float32, LINE)
                for other in gl.static_range(SHARES):
                    part = parts + other * size + cell
                    total += gl.load(part, mask=inside, other=0.0, cache_modifier=".cg")
            else:
                total = gl.sum(joint.index(r).load(ACROSS), 0)
            if HAS_BIAS:
                total += gl.load(bias + n, mask=inside, other=0.0).to(gl.float32)
            if RANKS == 0:
                gl.store(y + cell, total.to(y.dtype.element_ty), mask=inside)
            else:
                words = _pairs(total, y.dtype.element_ty, WARPS)
                place, wanted = places[r]
                for step in gl.static_range(RANKS):
                    gl.inline_asm_elementwise(
                        PUSH_PAIRS, "=r,l,r,r", [peers[step] + place, words, wanted.to(gl.int32)], gl.int32,
                        is_pure=False, pack=1,
                    )  # fmt: skip


def few_rows(
    x: Tensor, weight: Tensor, config: Configuration, bias: Tensor | None, y: Tensor,
    memory: PushMemory | None = None, unit: int = 1,
) -> None:  # fmt: skip
    """x (T, K) times the rows of a contiguous weight (N, K) into y (T, N).

    16-bit numbers that can be read 16 bytes at a time. config: SHARES, programs that share a sum, num_warps.
    memory: of all ranks, who get it in place of y, N being even, in units of so many bytes.
    """
    (tokens, width), columns = x.shape, weight.shape[0]
    rows, across = gluon_linear_form.ROWS, triton.cdiv(columns, gluon_linear_form.COLUMNS)
    shares, warps = config["SHARES"], config["num_warps"]
    parts = y if shares == 1 else x.new_empty((shares, tokens, columns), dtype=torch.float32)
    shared, ranks = counters(x.device), 0 if memory is None else memory.ranks
    to = (0, (0,), shared, 0, 0) if memory is None else (
        memory.rank, memory.peers, memory.counters, memory.slots, memory.slot_bytes
    )  # fmt: skip
    few_rows_kernel[(triton.cdiv(tokens, rows) * across * shares,)](
        x, weight, bias, y, parts, shared, x.stride(0), tokens, columns, across, *to, unit,
        K=width, SHARES=shares, EIGHTS=triton.cdiv(min(tokens, rows), 8), HAS_BIAS=bias is not None,
        WARPS=warps, RANKS=ranks, num_warps=warps, enable_fp_fusion=True, **launch_options(x.device),
    )  # fmt: skip
