"""Large products of a decode step of up to 64 sequences: in_proj with the convolution, and out_proj (Gluon, sm_90).

128 programs, one a multiprocessor, each with an equal share of the weight, which a warp of its own fetches as
far ahead as shared memory has room, before the kernel before has ended. in_proj's programs have the rows of x
and z of the same channels, and hand on x convolved. out_proj's have a part of the width and as many times more
rows, so that each needs that part of its input only; the norm that follows adds up the parts.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ssm_dist.kernels.gluon_ring import address_of, load4, wait_for
from ssm_dist.kernels.gluon_tiles import (
    ROW_BYTES,
    copy_tile,
    expect,
    multiply_tiles,
    open_rings,
    share_sums,
    store_word,
)
from ssm_dist.kernels.gluon_warp import WORD, barrier, pack, silu
from ssm_dist.kernels.gluon_words import LINE, THREADS, high, low, rounded

PADDED = gl.constexpr(16)
"""Bytes from row to row of x or z in shared memory beyond the channels', for other banks."""


@gluon.jit
def _fetch_weights(
    ring, map, second,
    PARTS: gl.constexpr, OWN: gl.constexpr, TILES: gl.constexpr, SLOTS: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """One warp: the tiles of two blocks of OWN rows, the second `second` rows after the first."""
    program = gl.program_id(0)
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    row = program // PARTS * (OWN if PARTS == 1 else 2 * OWN)
    begin = program % PARTS * (TILES * 64)
    slot, phase = 0, 0
    for tile in range(TILES):
        if tile >= AHEAD:
            before = tile - AHEAD
            wait_for(ring[1] + before % SLOTS * 8, before // SLOTS & 1, lane)
        wait_for(ring[2] + slot * 8, phase ^ 1, lane)
        at, to = ring[1] + slot * 8, ring[0] + slot * (2 * OWN * ROW_BYTES)
        expect(at, 2 * OWN * ROW_BYTES)
        copy_tile(to, map, begin + tile * 64, row, at)
        copy_tile(to + OWN * ROW_BYTES, map, begin + tile * 64, row + second, at)
        phase = gl.where(slot == SLOTS - 1, phase ^ 1, phase)
        slot = gl.where(slot == SLOTS - 1, 0, slot + 1)


@gluon.jit
def _fetch_inputs(
    ring, map,
    PARTS: gl.constexpr, TILES: gl.constexpr, SLOTS: gl.constexpr, SEQ: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One warp: the tiles of the input, or of a part of its width, when the kernel before has ended."""
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    if PDL:
        gdc_wait()
    gl.inline_asm_elementwise(
        "fence.proxy.async; mov.b32 $0, 0;", "=r,r", [lane], gl.int32, is_pure=False, pack=1
    )
    begin = gl.program_id(0) % PARTS * (TILES * 64)
    slot, phase = 0, 0
    for tile in range(TILES):
        wait_for(ring[2] + slot * 8, phase ^ 1, lane)
        expect(ring[1] + slot * 8, SEQ * ROW_BYTES)
        copy_tile(ring[0] + slot * (SEQ * ROW_BYTES), map, begin + tile * 64, 0, ring[1] + slot * 8)
        phase = gl.where(slot == SLOTS - 1, phase ^ 1, phase)
        slot = gl.where(slot == SLOTS - 1, 0, slot + 1)


@gluon.jit
def _rows_and_columns():
    """The row of the products that a thread has after `share_sums`, and the first of its columns."""
    thread = gl.arange(0, THREADS, LINE)
    return thread % 128 // 32 * 16 + thread % 32 // 4 + thread // 128 * 8, thread % 4 * 2


@gluon.jit
def _hand_over(kept, to, first, count, D: gl.constexpr, OWN: gl.constexpr, SEQ: gl.constexpr):
    """OWN channels of each of `count` rows from shared memory to (SEQ, D) bfloat16."""
    thread = gl.arange(0, THREADS, LINE)
    EIGHTS: gl.constexpr = OWN // 8
    for k in gl.static_range((SEQ * EIGHTS + THREADS - 1) // THREADS):
        item = k * THREADS + thread
        row, eight = gl.minimum(item // EIGHTS, SEQ - 1), item % EIGHTS
        w = load4(kept + row * (2 * OWN + PADDED) + eight * 16)
        at = to.to(WORD) + (row * D + first + eight * 8) // 2
        _store4(at, w, (item < SEQ * EIGHTS) & (row < count))


@gluon.jit
def _store4(at, words, wanted):
    """Four words to a multiple of 16 where wanted."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $6, 0; @p st.global.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0; }",
        "=r,l,r,r,r,r,r", [at.to(gl.int64), words[0], words[1], words[2], words[3], wanted.to(gl.int32)],
        gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _load4(at):
    """Four words of parameters from a multiple of 16."""
    return gl.inline_asm_elementwise(
        "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [at.to(gl.int64)],
        (gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _convolved(first, second, bias, lag3, lag2, lag1, current):
    total = bias + low(first) * lag3 + high(first) * lag2
    total += low(second) * lag1 + high(second) * current
    return silu(total)


@gluon.jit
def _project_and_convolve(
    weights, inputs, taps, bias, conv, slots, u, z, count, conv_slot, conv_row,
    D: gl.constexpr, OWN: gl.constexpr, TILES: gl.constexpr, SLOTS: gl.constexpr,
    INPUT_SLOTS: gl.constexpr, SEQ: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The warps that multiply, for `in_kernel`."""
    PAIRS: gl.constexpr = OWN // 8
    row, column = _rows_and_columns()
    first = gl.program_id(0) * OWN
    real = row < count
    factors, offsets = (), ()
    for j in gl.static_range(PAIRS):
        channel = first + 8 * j + column
        factors += (_load4(taps.to(WORD) + channel * 2),)
        offsets += (gl.load(bias.to(WORD) + channel // 2),)
    if PDL:
        gdc_wait()
    place = gl.load(slots + gl.minimum(row, count - 1)).to(gl.int64) * conv_slot
    window = (conv + place).to(WORD) + (first + column) // 2
    windows = ()
    for j in gl.static_range(PAIRS):
        at = window + 4 * j
        windows += ((
            gl.load(at, mask=real, other=0), gl.load(at + conv_row // 2, mask=real, other=0),
            gl.load(at + conv_row, mask=real, other=0),
        ),)  # fmt: skip
    sums = multiply_tiles(weights, inputs, TILES, 2 * OWN, SLOTS, INPUT_SLOTS, SEQ * ROW_BYTES)
    barrier()  # the rings are free
    mine = share_sums(sums, weights[0], 2 * OWN)
    kept = weights[0] + 2 * OWN * THREADS
    of_row = row * (2 * OWN + PADDED) + column * 2
    beside = SEQ * (2 * OWN + PADDED)
    for j in gl.static_range(PAIRS):
        lag3, lag2, lag1 = windows[j]
        current = pack(mine[j][0], mine[j][1], False)
        at = window + 4 * j
        gl.store(at, lag2, mask=real)
        gl.store(at + conv_row // 2, lag1, mask=real)
        gl.store(at + conv_row, current, mask=real)
        f, b = factors[j], offsets[j]
        left = _convolved(f[0], f[1], low(b), low(lag3), low(lag2), low(lag1), low(current))
        right = _convolved(f[2], f[3], high(b), high(lag3), high(lag2), high(lag1), high(current))
        store_word(kept + of_row + 16 * j, pack(left, right, False), row < SEQ)
        gate = mine[PAIRS + j]
        store_word(kept + beside + of_row + 16 * j, pack(gate[0], gate[1], False), row < SEQ)
    barrier()
    _hand_over(kept, u, first, count, D, OWN, SEQ)
    _hand_over(kept + beside, z, first, count, D, OWN, SEQ)


@gluon.jit
def _project_part(
    weights, inputs, parts, count,
    H: gl.constexpr, PARTS: gl.constexpr, OWN: gl.constexpr, TILES: gl.constexpr, SLOTS: gl.constexpr,
    INPUT_SLOTS: gl.constexpr, SEQ: gl.constexpr,
):  # fmt: skip
    """The warps that multiply, for `out_kernel`."""
    row, column = _rows_and_columns()
    sums = multiply_tiles(weights, inputs, TILES, 2 * OWN, SLOTS, INPUT_SLOTS, SEQ * ROW_BYTES)
    barrier()  # the rings are free
    mine = share_sums(sums, weights[0], 2 * OWN)
    program = gl.program_id(0)
    at = parts + ((program % PARTS * SEQ + row) * H + program // PARTS * (2 * OWN) + column)
    for j in gl.static_range(OWN // 4):
        gl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $4, 0; @p st.global.v2.f32 [$1], {$2, $3}; mov.b32 $0, 0; }",
            "=r,l,f,f,r", [(at + 8 * j).to(gl.int64), mine[j][0], mine[j][1], (row < count).to(gl.int32)],
            gl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def _open(OWN: gl.constexpr, SLOTS: gl.constexpr, INPUT_SLOTS: gl.constexpr, SEQ: gl.constexpr):
    """The rings of weights and of inputs, and what holds them."""
    WEIGHTS: gl.constexpr = SLOTS * 2 * OWN * ROW_BYTES
    RINGS: gl.constexpr = WEIGHTS + INPUT_SLOTS * SEQ * ROW_BYTES
    ALL: gl.constexpr = 1024 + RINGS + 8192 + 16 * (SLOTS + INPUT_SLOTS)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    arena = gl.allocate_shared_memory(gl.int32, [(ALL + 4095) // 4096, 1024], FLAT)
    start = (address_of(arena) + 1023) // 1024 * 1024
    at = start + RINGS + 8192
    open_rings(at, SLOTS, INPUT_SLOTS)
    weights = (start, at, at + 8 * SLOTS)
    return weights, (start + WEIGHTS, at + 16 * SLOTS, at + 16 * SLOTS + 8 * INPUT_SLOTS), arena


@gluon.jit(do_not_specialize=["count"])
def in_kernel(
    weight_map, input_map, taps, bias, conv, slots, u, z, count, conv_slot, conv_row,
    H: gl.constexpr, D: gl.constexpr, OWN: gl.constexpr, SLOTS: gl.constexpr, INPUT_SLOTS: gl.constexpr,
    AHEAD: gl.constexpr, SEQ: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One of D / OWN programs: OWN channels of in_proj's x, convolved, and of z, for `count` sequences.

    weight_map, input_map: addresses of tensor maps, of (2 D, H) in boxes of OWN rows and of (SEQ, H).
    taps: (D, 4), bias: (D,), conv: (slots, 3, D), bfloat16; slots: (count,) int32; u, z: (SEQ, D) bfloat16.
    """
    weights, inputs, arena = _open(OWN, SLOTS, INPUT_SLOTS, SEQ)
    if PDL:
        gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_project_and_convolve, (
                weights, inputs, taps, bias, conv, slots, u, z, count, conv_slot, conv_row, D, OWN, H // 64,
                SLOTS, INPUT_SLOTS, SEQ, PDL,
            )),
            (_fetch_weights, (weights, weight_map, D, 1, OWN, H // 64, SLOTS, AHEAD)),
            (_fetch_inputs, (inputs, input_map, 1, H // 64, INPUT_SLOTS, SEQ, PDL)),
        ],
        [1, 1], [32, 32],
    )  # fmt: skip
    if count < 0:  # so that the compiler keeps the memory
        gl.store(slots + gl.maximum(arena.index(0).load(LINE), 0), 0)


@gluon.jit(do_not_specialize=["count"])
def out_kernel(
    weight_map, input_map, parts, slots, count,
    H: gl.constexpr, D: gl.constexpr, PARTS: gl.constexpr, OWN: gl.constexpr, SLOTS: gl.constexpr,
    INPUT_SLOTS: gl.constexpr, AHEAD: gl.constexpr, SEQ: gl.constexpr, PDL: gl.constexpr,
    EARLY: gl.constexpr = True,
):  # fmt: skip
    """One of H / (2 OWN) * PARTS programs: 2 OWN of out_proj's outputs, over a part of its width.

    weight_map, input_map: of (H, D) in boxes of OWN rows and of (SEQ, D). parts: (PARTS, SEQ, H) float32.
    """
    weights, inputs, arena = _open(OWN, SLOTS, INPUT_SLOTS, SEQ)
    if PDL and EARLY:
        gdc_launch_dependents()
    TILES: gl.constexpr = D // PARTS // 64
    gl.warp_specialize(
        [
            (_project_part, (weights, inputs, parts, count, H, PARTS, OWN, TILES, SLOTS, INPUT_SLOTS, SEQ)),
            (_fetch_weights, (weights, weight_map, OWN, PARTS, OWN, TILES, SLOTS, AHEAD)),
            (_fetch_inputs, (inputs, input_map, PARTS, TILES, INPUT_SLOTS, SEQ, PDL)),
        ],
        [1, 1], [32, 32],
    )  # fmt: skip
    if count < 0:
        gl.store(slots + gl.maximum(arena.index(0).load(LINE), 0), 0)
