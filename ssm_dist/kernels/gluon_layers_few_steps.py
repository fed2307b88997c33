"""What a layer takes besides large products and exchanges, for `gluon_layers_few` (Gluon, sm_90)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ssm_dist.kernels import gluon_layers_form as form
from ssm_dist.kernels.gluon_ring import WARPS
from ssm_dist.kernels.gluon_shared import load1, load4, load_half, store1, store_pair
from ssm_dist.kernels.gluon_warp import product_of_16, silu
from ssm_dist.kernels.gluon_words import LINE, THREADS, high, low, rounded

CHANNELS = gl.constexpr(form.CHANNELS)


@gluon.constexpr_function
def tile_layout(sequences):
    """(CHANNELS, sequences)."""
    return gl.BlockedLayout([1, max(1, sequences // 4)], [8, 4], [8, 1], [1, 0])


@gluon.constexpr_function
def _swap(lanes):
    return f"shfl.sync.bfly.b32 $0, $1, {lanes}, 0x1f, 0xffffffff;"


@gluon.jit
def over_warp(value):
    """The sum of a number over the lanes of a warp, in all of them."""
    for k in gl.static_range(5):
        value += gl.inline_asm_elementwise(
            _swap(16 >> k), "=f,f", [value], gl.float32, is_pure=True, pack=1
        )
    return value


@gluon.jit
def over_sources(at, sequence, P: gl.constexpr, SEQ: gl.constexpr):
    """The sum of what P programs sent for a warp's sequence; (P, SEQ) float32 in shared memory."""
    lane = gl.arange(0, THREADS, LINE) % 32
    sum = gl.zeros([THREADS], gl.float32, LINE)
    for k in gl.static_range((P + 31) // 32):
        source = k * 32 + lane
        value = load1(at + (gl.minimum(source, P - 1) * SEQ + sequence) * 4)
        sum += gl.where(source < P, value, 0.0)
    return over_warp(sum)


@gluon.jit
def convolve_tile(current, window, conv, real, conv_row):
    """silu of the convolution, which takes `current` into its state; 0 where nothing is real."""
    first, second, bias, lag3, lag2, lag1 = window
    current = current.to(gl.bfloat16)
    gl.store(conv, lag2, mask=real)
    gl.store(conv + conv_row, lag1, mask=real)
    gl.store(conv + 2 * conv_row, current, mask=real)
    sum = bias.to(gl.float32)[:, None] + low(first)[:, None] * lag3.to(gl.float32)
    sum += high(first)[:, None] * lag2.to(gl.float32) + low(second)[:, None] * lag1.to(gl.float32)
    sum += high(second)[:, None] * current.to(gl.float32)
    return gl.where(real, rounded(silu(sum)), 0.0)


@gluon.constexpr_function
def _loading(words):
    results = [f"${i}" for i in range(words)]
    zeros = " ".join(f"mov.b32 {r}, 0;" for r in results)
    return (
        f"{{ .reg .pred p; setp.ne.s32 p, ${words + 1}, 0; {zeros} "
        f"@p ld.global.nc.v{words}.b32 {{{', '.join(results)}}}, [${words}]; }}"
    )


@gluon.constexpr_function
def _loaded(words):
    return ",".join(["=&r"] * words + ["l", "r"])


@gluon.constexpr_function
def _words(count):
    return tuple([gl.int32] * count)


@gluon.jit
def _load_words(at, wanted, WORDS: gl.constexpr):
    """2 or 4 words of parameters, in one go, where wanted; else zeros."""
    return gl.inline_asm_elementwise(
        _loading(WORDS), _loaded(WORDS), [at.to(gl.int64), wanted.to(gl.int32)], _words(WORDS),
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def prefetch(start, count, line):
    """Ask for line `line` of the `count` bytes at an address, if there is one, to come to the L2 cache."""
    at = start.to(gl.int64) + gl.to_tensor(line) * 128 + gl.arange(0, THREADS, LINE) * 0
    wanted = gl.to_tensor(line) * 128 + gl.arange(0, THREADS, LINE) * 0 < count
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r", [at, wanted.to(gl.int32)], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load_x_columns(start, first, OWN: gl.constexpr, OUTPUTS: gl.constexpr, D: gl.constexpr):
    """This program's columns of x_proj, from `first` on, as what `input_products` multiplies at the left.

    Warp w has rows 16 w on of every 16 WARPS.
    """
    thread = gl.arange(0, THREADS, LINE)
    lane, warp = thread % 32, thread // 32
    result = ()
    for t in gl.static_range((OUTPUTS + 16 * WARPS - 1) // (16 * WARPS)):
        tile = ()
        for c in gl.static_range((OWN + 31) // 32):
            for half in gl.static_range(2):
                row = (t * WARPS + warp) * 16 + lane // 4 + half * 8
                k = c * 32 + lane % 4 * 8
                at = start + (row * (D // 2) + (first + k) // 2)
                here = (row < OUTPUTS) & (first + k < D)
                for i in gl.static_range(0, 4, 2):
                    if OWN % 4 == 0:
                        tile += (_load_words(at + i, here & (k + 2 * i < OWN), 2),)
                    else:
                        word = gl.load(at + i, mask=here & (k + 2 * i < OWN), other=0)
                        tile += ((word, gl.load(at + i + 1, mask=here & (k + 2 * i + 2 < OWN), other=0)),)
        result += (tile,)
    return result


@gluon.jit
def input_products(columns, inputs, STRIDE: gl.constexpr, OWN: gl.constexpr, SEQ: gl.constexpr):
    """What `load_x_columns` gave times the sequences' inputs: of each tile four numbers a lane.

    Those of row lane / 4 and sequences 2 (lane % 4) and the next, then of the row eight on. inputs: of a
    sequence OWN bfloat16 in shared memory, STRIDE bytes from the one before, what follows them finite.
    """
    thread = gl.arange(0, THREADS, LINE)
    zero = gl.zeros([THREADS], gl.float32, LINE)
    result = ()
    for t in gl.static_range(len(columns)):
        sums = (zero, zero, zero, zero)
        for c in gl.static_range((OWN + 31) // 32):
            v = load4(inputs + (thread % 32 // 4 % SEQ * STRIDE + (c * 32 + thread % 4 * 8) * 2))
            for i in gl.static_range(2):
                a, b = columns[t][4 * c + i], columns[t][4 * c + 2 + i]
                sums = product_of_16((a[0], b[0], a[1], b[1]), (v[2 * i], v[2 * i + 1]), sums, False)
        result += (sums,)
    return result


@gluon.jit
def load_dt_rows(start, first, OWN: gl.constexpr, D: gl.constexpr, R: gl.constexpr):
    """This program's rows of dt_proj as what `step_products` multiplies at the left.

    Warp w has rows 16 (w % 4) on, and of every 64 columns those from 32 (w // 4) on.
    """
    thread = gl.arange(0, THREADS, LINE)
    lane, warp = thread % 32, thread // 32
    local = warp % 4 * 16 + lane // 4
    result = ()
    for c in gl.static_range((R + 63) // 64):
        k = c * 64 + warp // 4 * 32 + lane % 4 * 8
        for half in gl.static_range(2):
            own = local + half * 8
            here = (own < OWN) & (first + own < D) & (k < R)
            result += (_load_words(start + ((first + own) * (R // 2) + k // 2), here, 4),)
    return result


@gluon.jit
def step_products(to, rows, totals, R: gl.constexpr, OUTPUTS: gl.constexpr, SEQ: gl.constexpr):
    """dt_proj's rows times the sequences' first R numbers: two shares, (CHANNELS, SEQ) float32 each, at `to`.

    totals: (SEQ, OUTPUTS) bfloat16 in shared memory.
    """
    thread = gl.arange(0, THREADS, LINE)
    lane, warp = thread % 32, thread // 32
    zero = gl.zeros([THREADS], gl.float32, LINE)
    sums = (zero, zero, zero, zero)
    for c in gl.static_range((R + 63) // 64):
        k = c * 64 + warp // 4 * 32 + lane % 4 * 8
        v = load4(totals + (lane // 4 % SEQ * OUTPUTS + gl.minimum(k, R - 8)) * 2)  # past R, times zeros
        a, b = rows[2 * c], rows[2 * c + 1]
        sums = product_of_16((a[0], b[0], a[1], b[1]), (v[0], v[1]), sums, False)
        sums = product_of_16((a[2], b[2], a[3], b[3]), (v[2], v[3]), sums, False)
    at = to + warp // 4 * (CHANNELS * SEQ * 4) + (warp % 4 * 16 + lane // 4) * (SEQ * 4) + lane % 4 * 8
    store_pair(at, sums[0], sums[1], lane % 4 * 2 < SEQ)
    store_pair(at + 8 * SEQ * 4, sums[2], sums[3], lane % 4 * 2 < SEQ)


@gluon.jit
def rms_scales(scales, totals, sequence, rms_eps, R: gl.constexpr, N: gl.constexpr):
    """The scales of the norms of dt, B and C of a warp's sequence, at 64, 128 and 192 bytes from `scales`."""
    lane = gl.arange(0, THREADS, LINE) % 32
    row = totals + sequence * ((R + 2 * N) * 2)
    squares = gl.zeros([THREADS], gl.float32, LINE)
    for k in gl.static_range((R + 31) // 32):
        here = k * 32 + lane
        value = load_half(row + gl.minimum(here, R - 1) * 2)
        squares += gl.where(here < R, value * value, 0.0)
    store1(scales + 64 + sequence * 4, gl.rsqrt(over_warp(squares) / R + rms_eps))
    for k in gl.static_range(2):
        value = load_half(row + (R + k * N + lane % N) * 2)
        squares = gl.where(lane < N, value * value, 0.0)
        store1(scales + 128 + 64 * k + sequence * 4, gl.rsqrt(over_warp(squares) / N + rms_eps))
