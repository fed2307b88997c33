"""Weights streamed through a ring in shared memory by a warp of their own, and their products (Gluon, sm_90).

A piece is eight rows, or a part of their width; the last part may be narrower, and x is zero past it. The
fetching warp asks for the pieces of all layers in the order of their use, by bulk copies, a row a lane, as
soon as there is room; so memory stays busy while the other warps wait for each other. It never has more than
AHEAD pieces in flight: with more, the words of `gluon_words` would stand behind megabytes of weights (a step
of mamba-2.8b: 1.42 ms with 60 KB in flight a multiprocessor, 1.58 ms with 200 KB).

A product is that of m16n8k16: eight rows of the weight at the right, x as each of 16 rows at the left. Each
warp has its share of the width; since a sum over k may go in any order, the eight neighbours that a lane
loads at a time count as the k that are its own.

Gluon has no bulk copies without tensor descriptors, of which there would have to be two a layer; so the ring
is shared memory by address (`gluon_shared`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ssm_dist.kernels import gluon_layers_form as form
from ssm_dist.kernels.gluon_shared import load1, load4, store_pair
from ssm_dist.kernels.gluon_warp import barrier, product_of_16
from ssm_dist.kernels.gluon_words import LINE, THREADS

WARPS = gl.constexpr(form.WARPS)


row_bytes = gluon.constexpr_function(form.row_bytes)


@gluon.jit
def open_barriers(at, COUNT: gl.constexpr):
    """COUNT barriers of WARPS arrivals each, from the address `at` on; then a barrier of all threads."""
    thread = gl.arange(0, THREADS, LINE)
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p mbarrier.init.shared::cta.b64 [$1], $3; "
        "fence.mbarrier_init.release.cluster; fence.proxy.async; mov.b32 $0, 0; }",
        "=r,r,r,r", [at + thread * 8, (thread < COUNT).to(gl.int32), WARPS], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    barrier()


@gluon.jit
def wait_for(at, phase, like):
    """Until the barrier at an address has ended a phase (0 or 1); `like`: a tensor of the caller's warps."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2; @!p bra again; "
        "mov.b32 $0, 0; }",
        "=r,r,r", [at + like * 0, phase], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _release(at, like):
    """The warp has read a piece."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 lane; bar.warp.sync 0xffffffff; mov.u32 lane, %laneid; "
        "setp.eq.u32 p, lane, 0; @p mbarrier.arrive.shared::cta.b64 _, [$1]; mov.b32 $0, 0; }",
        "=r,r", [at + like * 0], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


# Each of the first lanes asks for its row where that has bytes, and arrives in any case.
FETCH = gl.constexpr("""
{
    .reg .pred p, q;
    .reg .u32 lane;
    mov.u32 lane, %laneid;
    setp.lt.u32 q, lane, $5;
    setp.ne.and.s32 p, $4, 0, q;
    setp.eq.and.s32 q, $4, 0, q;
    @q mbarrier.arrive.shared::cta.b64 _, [$3];
    @p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$3], $4;
    @p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$1], [$2], $4, [$3];
    mov.b32 $0, 0;
}""")


@gluon.jit
def fetch(ring, slot, source, size, CHUNKS: gl.constexpr):
    """Ask for a piece: source, (32,) int64, addresses of the parts of rows; size: bytes of each, or 0.

    ring: addresses of the pieces, of the barriers of their arrival, and of those of their release.
    """
    row = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    to = ring[0] + (slot * WARPS + row) * row_bytes(CHUNKS)
    gl.inline_asm_elementwise(
        FETCH, "=r,r,l,r,r,r", [to, source, ring[1] + slot * 8, size, WARPS], gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _times_x(x0, x1, w0, w1, c):
    """x, as each of 16 rows, times eight rows of a weight, plus c."""
    return product_of_16((x0, x0, x1, x1), (w0, w1), c, False)


@gluon.jit
def _own_share(at, thread, CHUNKS: gl.constexpr):
    """Where a lane's numbers of a part of x begin; the next are 64 bytes on."""
    return at + (thread // 32 * (CHUNKS * 64) + thread % 4 * 16)


@gluon.jit
def inputs(at, PARTS: gl.constexpr, CHUNKS: gl.constexpr):
    """What a lane needs of the x at an address, in PARTS parts."""
    thread = gl.arange(0, THREADS, LINE)
    result = ()
    for part in gl.static_range(PARTS):
        for k in gl.static_range(CHUNKS):
            result += (load4(_own_share(at + part * (CHUNKS * 512), thread, CHUNKS) + k * 64),)
    return result


@gluon.jit
def multiply(
    place, ring, x, to,
    PARTS: gl.constexpr, CHUNKS: gl.constexpr, SLOTS: gl.constexpr, HELD: gl.constexpr,
):  # fmt: skip
    """Eight rows times x from the ring's next PARTS pieces; returns the place after them.

    place: slot and phase; x: what `inputs` gave, or not HELD, the address of x. Each warp's share of the sums
    goes to the address `to`, those of the next warp 256 bytes on.
    """
    thread = gl.arange(0, THREADS, LINE)
    slot, phase = place
    zero = gl.zeros([THREADS], gl.float32, LINE)
    none = (zero, zero, zero, zero)
    a, b, c, d = none, none, none, none
    from_row = _own_share(ring[0], thread, CHUNKS) + thread % 32 // 4 * row_bytes(CHUNKS)
    for part in gl.static_range(PARTS):
        wait_for(ring[1] + slot * 8, phase, thread)
        for k in gl.static_range(CHUNKS):
            w = load4(from_row + (slot * (WARPS * row_bytes(CHUNKS)) + k * 64))
            if HELD:
                v = x[part * CHUNKS + k]
            else:
                v = load4(_own_share(x + part * (CHUNKS * 512), thread, CHUNKS) + k * 64)
            if k % 2 == 0:
                a = _times_x(v[0], v[1], w[0], w[1], a)
                b = _times_x(v[2], v[3], w[2], w[3], b)
            else:
                c = _times_x(v[0], v[1], w[0], w[1], c)
                d = _times_x(v[2], v[3], w[2], w[3], d)
        _release(ring[2] + slot * 8, thread)
        phase = gl.where(slot == SLOTS - 1, phase ^ 1, phase)
        slot = gl.where(slot == SLOTS - 1, 0, slot + 1)
    # rows 2 i and 2 i + 1 of lane i, and copies of them in the other lanes
    store_pair(
        to + (thread // 32 * 256 + thread % 4 * 8),
        (a[0] + b[0]) + (c[0] + d[0]), (a[1] + b[1]) + (c[1] + d[1]), thread % 32 < 4,
    )  # fmt: skip
    return slot, phase


@gluon.jit
def total(at, APART: gl.constexpr = 256):
    """The sum of what the warps have stored at an address, in order, each APART bytes on."""
    result = load1(at)
    for warp in gl.static_range(1, WARPS):
        result += load1(at + warp * APART)
    return result


@gluon.jit
def inputs_of(at, WIDTH_BYTES: gl.constexpr, SEQ: gl.constexpr, PARTS: gl.constexpr, CHUNKS: gl.constexpr):
    """`inputs` of SEQ sequences: a lane has those of sequence lane // 4, modulo SEQ."""
    thread = gl.arange(0, THREADS, LINE)
    return inputs(at + thread % 32 // 4 % SEQ * WIDTH_BYTES, PARTS, CHUNKS)


@gluon.jit
def multiply_few(
    place, ring, x, to, COLUMNS: gl.constexpr,
    PARTS: gl.constexpr, CHUNKS: gl.constexpr, SLOTS: gl.constexpr, SEQ: gl.constexpr,
):  # fmt: skip
    """`multiply` for SEQ sequences: x is what `inputs_of` gave; returns the place.

    Each warp's share goes to `to`, the next sequence's COLUMNS numbers on, the next warp's behind them all.
    """
    thread = gl.arange(0, THREADS, LINE)
    slot, phase = place
    zero = gl.zeros([THREADS], gl.float32, LINE)
    none = (zero, zero, zero, zero)
    a, b = none, none
    from_row = _own_share(ring[0], thread, CHUNKS) + thread % 32 // 4 * row_bytes(CHUNKS)
    for part in gl.static_range(PARTS):
        wait_for(ring[1] + slot * 8, phase, thread)
        for k in gl.static_range(CHUNKS):
            w = load4(from_row + (slot * (WARPS * row_bytes(CHUNKS)) + k * 64))
            v = x[part * CHUNKS + k]
            a = _times_x(v[0], v[1], w[0], w[1], a)
            b = _times_x(v[2], v[3], w[2], w[3], b)
        _release(ring[2] + slot * 8, thread)
        phase = gl.where(slot == SLOTS - 1, phase ^ 1, phase)
        slot = gl.where(slot == SLOTS - 1, 0, slot + 1)
    sequence = thread % 32 // 4
    at = to + ((thread // 32 * SEQ + sequence) * (COLUMNS * 4) + thread % 4 * 8)
    store_pair(at, a[0] + b[0], a[1] + b[1], sequence < SEQ)
    return slot, phase
