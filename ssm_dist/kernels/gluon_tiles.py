"""Tiles of matrices through rings in shared memory, and their products by warpgroups (Gluon, sm_90).

A tile is 64 numbers of each of some rows, 128 bytes, swizzled as wgmma reads them, and arrives by tensor
copies. Two rings: one of weights, which a warp fills as far ahead as there is room, and one of inputs, which
another fills when they are known to be there. The two warpgroups that multiply take tiles by turns: each adds
up half of the width, and in the end they exchange halves of the rows.

As in `gluon_ring`, the rings are shared memory by address, and what touches them is assembly.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ssm_dist.kernels.gluon_ring import load2, store_pair, wait_for
from ssm_dist.kernels.gluon_warp import barrier
from ssm_dist.kernels.gluon_words import LINE, THREADS

ROW_BYTES = gl.constexpr(128)
"""Of a tile."""
DESCRIPTION = gl.constexpr(1 << 62 | 64 << 32 | 1 << 16)
"""Of a tile for wgmma, but for its address: swizzled by 128 bytes, eight rows in 1,024."""


@gluon.jit
def open_rings(at, WEIGHTS: gl.constexpr, INPUTS: gl.constexpr):
    """The barriers of two rings from the address `at` on: of arrival, then of release, of either.

    Somebody asks for a tile, and the four warps of a warpgroup release it. Then a barrier of all threads.
    """
    thread = gl.arange(0, THREADS, LINE)
    filled = (thread < WEIGHTS) | ((thread >= 2 * WEIGHTS) & (thread < 2 * WEIGHTS + INPUTS))
    exists = thread < 2 * (WEIGHTS + INPUTS)
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p mbarrier.init.shared::cta.b64 [$1], $3; "
        "fence.mbarrier_init.release.cluster; fence.proxy.async; mov.b32 $0, 0; }",
        "=r,r,r,r", [at + thread * 8, exists.to(gl.int32), gl.where(filled, 1, 4)], gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip
    barrier()


@gluon.jit
def expect(at, bytes):
    """One warp: so many bytes will arrive at the barrier at an address."""
    like = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0])) * 0
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 lane; mov.u32 lane, %laneid; setp.eq.u32 p, lane, 0; "
        "@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2; mov.b32 $0, 0; }",
        "=r,r,r", [at + like, bytes + like], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def copy_tile(to, map, column, row, at):
    """One warp: ask for the box of a tensor map from a column and row on, to arrive at a barrier."""
    like = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0])) * 0
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 lane; mov.u32 lane, %laneid; setp.eq.u32 p, lane, 0; "
        "@p cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[$1], [$2, {$3, $4}], [$5]; mov.b32 $0, 0; }",
        "=r,r,l,r,r,r", [to + like, map + like, column + like, row + like, at + like], gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def store_word(at, word, wanted):
    """A word into shared memory where wanted."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.shared.b32 [$1], $2; mov.b32 $0, 0; }",
        "=r,r,r,r", [at, word, wanted.to(gl.int32)], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def _multiplying(columns):
    """$0 on: the sums, as results and as operands; then what describes the tiles of x and of the weight."""
    count = columns // 2
    sums = ", ".join(f"${i}" for i in range(count))
    lines = [
        "{", ".reg .b64 x, w; .reg .pred p; .reg .b32 one;",
        f"mov.b64 x, ${2 * count}; mov.b64 w, ${2 * count + 1};", "mov.b32 one, 1; setp.ne.s32 p, one, 0;",
        "wgmma.fence.sync.aligned;",
    ]  # fmt: skip
    for _ in range(4):
        lines += [
            f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {{{sums}}}, x, w, p, 1, 1, 0, 0;",
            "add.s64 x, x, 2; add.s64 w, w, 2;",
        ]
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;", "}"])


@gluon.constexpr_function
def _multiplied(columns):
    count = columns // 2
    return ",".join([*["=f"] * count, *map(str, range(count)), "l", "l"])


@gluon.constexpr_function
def _floats(count):
    return tuple([gl.float32] * count)


@gluon.jit
def _described(at):
    return (at >> 4).to(gl.int64) + DESCRIPTION


@gluon.jit
def _release(at, like):
    """The warp has read a tile."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 lane; mov.u32 lane, %laneid; setp.eq.u32 p, lane, 0; "
        "@p mbarrier.arrive.shared::cta.b64 _, [$1]; mov.b32 $0, 0; }",
        "=r,r", [at + like * 0], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def multiply_tiles(
    weights, inputs,
    TILES: gl.constexpr, COLUMNS: gl.constexpr, SLOTS: gl.constexpr, INPUT_SLOTS: gl.constexpr,
    INPUT_BYTES: gl.constexpr,
):  # fmt: skip
    """The sums over TILES tiles, an even number: 64 rows of x times COLUMNS rows of a weight.

    weights, inputs: addresses of a ring's tiles, of their barriers of arrival and of release. Returns what a
    thread has of wgmma's sums, those of its warpgroup, for `share_sums`.
    """
    thread = gl.arange(0, THREADS, LINE)
    group = thread // 128
    zero = gl.zeros([THREADS], gl.float32, LINE)
    sums = ()
    for _ in gl.static_range(COLUMNS // 2):
        sums += (zero,)
    for i in range(TILES // 2):
        n = 2 * i + group
        slot, input_slot = n % SLOTS, n % INPUT_SLOTS
        wait_for(inputs[1] + input_slot * 8, n // INPUT_SLOTS & 1, thread)
        wait_for(weights[1] + slot * 8, n // SLOTS & 1, thread)
        x = _described(inputs[0] + input_slot * INPUT_BYTES)
        w = _described(weights[0] + slot * (COLUMNS * ROW_BYTES))
        given = ()
        for k in gl.static_range(COLUMNS // 2):
            given += (sums[k],)
        sums = gl.inline_asm_elementwise(
            _multiplying(COLUMNS), _multiplied(COLUMNS), given + (x, w), _floats(COLUMNS // 2),
            is_pure=False, pack=1,
        )  # fmt: skip
        _release(weights[2] + slot * 8, thread)
        _release(inputs[2] + input_slot * 8, thread)
    return sums


@gluon.jit
def share_sums(sums, at, COLUMNS: gl.constexpr):
    """What both warpgroups have of a thread's row; `at`: of COLUMNS * 256 bytes of shared memory.

    Returns (COLUMNS / 8) pairs: of row 16 (warp % 4) + lane / 4 + 8 (warp / 4), columns 8 j + 2 (lane % 4)
    and the next. The memory must not be written again before another barrier.
    """
    thread = gl.arange(0, THREADS, LINE)
    first = thread < 128
    for j in gl.static_range(COLUMNS // 8):
        away = gl.where(first, sums[4 * j + 2], sums[4 * j])
        beside = gl.where(first, sums[4 * j + 3], sums[4 * j + 1])
        store_pair(at + (j * THREADS + thread) * 8, away, beside, thread >= 0)
    barrier()
    result = ()
    for j in gl.static_range(COLUMNS // 8):
        low, high = load2(at + (j * THREADS + (thread ^ 128)) * 8)
        mine = gl.where(first, sums[4 * j], sums[4 * j + 2])
        next = gl.where(first, sums[4 * j + 1], sums[4 * j + 3])
        # the first warpgroup's part first, whoever adds
        result += ((gl.where(first, mine + low, low + mine), gl.where(first, next + high, high + next)),)
    return result
