"""What a layer takes besides the products of in_proj and out_proj, for `gluon_layers` (Gluon, sm_90)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ssm_dist.kernels import gluon_layers_form as form
from ssm_dist.kernels.gluon_ring import WARPS
from ssm_dist.kernels.gluon_shared import load1, store1, store2, store4
from ssm_dist.kernels.gluon_warp import barrier, pack, silu
from ssm_dist.kernels.gluon_words import LINE, THREADS, high, low, rounded

NORM, IN, TAPS, CONV_BIAS, X, DT, DT_BIAS, A_LOG, SKIP, OUT = map(gl.constexpr, range(10))
"""Columns of the table: the order of `decode_layers.LayerWeights`."""
FIELDS = gl.constexpr(form.FIELDS)
ROUND = gl.constexpr(form.ROUND)
CHANNELS = gl.constexpr(form.CHANNELS)
PAIR = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [8, 1], [1, 0]))
"""(CHANNELS, n): four lanes a channel."""
CHANNEL = gl.constexpr(gl.SliceLayout(1, PAIR))
FAILED = gl.constexpr(4 * 64)
"""The code of a wait for rank 0 that failed (`failures.ALGORITHMS`); the next are the other ranks'."""
BF16 = gl.constexpr(gl.pointer_type(gl.bfloat16))
FLOAT = gl.constexpr(gl.pointer_type(gl.float32))


@gluon.jit
def field(table, layer, FIELD: gl.constexpr):
    """How far a layer's parameter is from the anchor, in words."""
    return gl.multiple_of(gl.load(table + (layer * FIELDS + FIELD)), 4)


@gluon.jit
def load_pairs(start, WIDTH: gl.constexpr, inside):
    """Numbers 4 t to 4 t + 3 of thread t from each round's part of (WIDTH,) bfloat16, as two words."""
    thread = gl.arange(0, THREADS, LINE)
    result = ()
    for k in gl.static_range((WIDTH + ROUND - 1) // ROUND):
        here = inside & (k * ROUND + thread * 4 < WIDTH)
        at = start + (k * (ROUND // 2) + thread * 2)
        result += ((gl.load(at, mask=here, other=0), gl.load(at + 1, mask=here, other=0)),)
    return result


@gluon.jit
def widened(pairs, WIDTH: gl.constexpr):
    """What `load_pairs` gave, in float32, four numbers a round."""
    result = ()
    for k in gl.static_range((WIDTH + ROUND - 1) // ROUND):
        first, second = pairs[k][0], pairs[k][1]
        result += ((low(first), high(first), low(second), high(second)),)
    return result


@gluon.jit
def load_fours(start, WIDTH: gl.constexpr):
    """The numbers of `load_pairs`, of (WIDTH,) float32."""
    thread = gl.arange(0, THREADS, LINE)
    result = ()
    for k in gl.static_range((WIDTH + ROUND - 1) // ROUND):
        at = start + (k * ROUND + thread * 4)
        here = k * ROUND + thread * 4 < WIDTH
        four = ()
        for i in gl.static_range(4):
            four += (gl.load(at + i, mask=here, other=0.0),)
        result += (four,)
    return result


@gluon.jit
def store_rounds(start, rounds, EACH: gl.constexpr, WIDTH: gl.constexpr):
    """Store what each thread has of (WIDTH,) numbers, EACH elements a round, in order."""
    thread = gl.arange(0, THREADS, LINE)
    for k in gl.static_range((WIDTH + ROUND - 1) // ROUND):
        exists = k * ROUND + thread * 4 < WIDTH
        to = start + (k * THREADS + thread) * EACH
        for i in gl.static_range(EACH):
            gl.store(to + i, rounds[k][i], mask=exists)


@gluon.jit
def keep(to, pairs, WIDTH: gl.constexpr):
    """Put what the threads have of (WIDTH,) into shared memory, in order, for all of them."""
    thread = gl.arange(0, THREADS, LINE)
    for k in gl.static_range((WIDTH + ROUND - 1) // ROUND):
        store2(to + (k * THREADS + thread) * 8, pairs[k][0], pairs[k][1])
    barrier()


@gluon.jit
def sums_of_round(words, k: gl.constexpr, ROUNDS: gl.constexpr, RANKS: gl.constexpr):
    """What came from all ranks for the four numbers of a thread in round k, added up in order."""
    a, b = low(words[2 * k]), high(words[2 * k])
    c, d = low(words[2 * k + 1]), high(words[2 * k + 1])
    for r in gl.static_range(1, RANKS):
        first, second = words[2 * (r * ROUNDS + k)], words[2 * (r * ROUNDS + k) + 1]
        a, b, c, d = a + low(first), b + high(first), c + low(second), d + high(second)
    return a, b, c, d


@gluon.jit
def add_sums(stream, words, WIDTH: gl.constexpr, RANKS: gl.constexpr):
    """The residual stream, by round four times (THREADS,), plus the sum of what came from all ranks."""
    ROUNDS: gl.constexpr = (WIDTH + ROUND - 1) // ROUND
    result = ()
    for k in gl.static_range(ROUNDS):
        old, new = stream[k], sums_of_round(words, k, ROUNDS, RANKS)
        result += ((old[0] + new[0], old[1] + new[1], old[2] + new[2], old[3] + new[3]),)
    return result


@gluon.jit
def norm(stream, gains, WIDTH: gl.constexpr, eps):
    """The RMS norm of the residual stream, as `load_pairs`."""
    thread = gl.arange(0, THREADS, LINE)
    squares = gl.zeros([THREADS], gl.float32, LINE)
    for k in gl.static_range((WIDTH + ROUND - 1) // ROUND):
        v = stream[k]
        square = v[0] * v[0] + v[1] * v[1] + (v[2] * v[2] + v[3] * v[3])
        squares += gl.where(k * ROUND + thread * 4 < WIDTH, square, 0.0)
    scale = gl.rsqrt(gl.sum(squares, 0) / WIDTH + eps)
    result = ()
    for k in gl.static_range((WIDTH + ROUND - 1) // ROUND):
        v, gain = stream[k], gains[k]
        result += ((
            pack(v[0] * scale * low(gain[0]), v[1] * scale * high(gain[0]), False),
            pack(v[2] * scale * low(gain[1]), v[3] * scale * high(gain[1]), False),
        ),)  # fmt: skip
    return result


@gluon.jit
def load_window(anchor, table, layer, conv, channel, inside, place, real, conv_row):
    """Taps and bias of the convolution of channels inside; its last inputs, at conv + place, where real."""
    taps = anchor + field(table, layer, TAPS) + channel * 2
    at = conv + place
    return (
        gl.load(taps, mask=inside, other=0),
        gl.load(taps + 1, mask=inside, other=0),
        gl.load((anchor + field(table, layer, CONV_BIAS)).to(BF16) + channel, mask=inside, other=0.0),
        gl.load(at, mask=real, other=0.0),
        gl.load(at + conv_row, mask=real, other=0.0),
        gl.load(at + 2 * conv_row, mask=real, other=0.0),
    )


@gluon.jit
def convolve(current, window, conv, channel, inside, conv_row):
    """silu of the convolution, which takes `current` into its state."""
    first, second, bias, lag3, lag2, lag1 = window
    at = conv + channel
    current = current.to(gl.bfloat16)
    gl.store(at, lag2, mask=inside)
    gl.store(at + conv_row, lag1, mask=inside)
    gl.store(at + 2 * conv_row, current, mask=inside)
    total = bias.to(gl.float32) + low(first) * lag3.to(gl.float32) + high(first) * lag2.to(gl.float32)
    total += low(second) * lag1.to(gl.float32) + high(second) * current.to(gl.float32)
    return rounded(silu(total))


@gluon.jit
def load_x_rows(
    start, first, APART: gl.constexpr, D: gl.constexpr, WIDTH: gl.constexpr, OUTPUTS: gl.constexpr
):
    """This program's rows of x_proj, every APART-th from `first` on: `load_pairs` of WIDTH of D numbers."""
    rows = ()
    for j in gl.static_range((OUTPUTS + APART - 1) // APART):
        row = first + j * APART
        rows += (load_pairs(start + row * (D // 2), WIDTH, row < OUTPUTS),)
    return rows


@gluon.jit
def project(rows, u, scratch, APART: gl.constexpr, D: gl.constexpr, OUTPUTS: gl.constexpr):
    """The products of `load_x_rows` with u; thread j gets that of row j."""
    OWN: gl.constexpr = (OUTPUTS + APART - 1) // APART
    thread = gl.arange(0, THREADS, LINE)
    for j in gl.static_range(OWN):
        sums = gl.zeros([THREADS], gl.float32, LINE)
        for k in gl.static_range((D + ROUND - 1) // ROUND):
            real = k * ROUND + thread * 4 < D
            for i in gl.static_range(2):
                w, v = rows[j][k][i], gl.where(real, u[2 * k + i], 0)
                sums += low(w) * low(v) + high(w) * high(v)
        of_warp = gl.sum(sums.reshape([WARPS, 32]), 1)
        warp = gl.arange(0, WARPS, of_warp.type.layout)
        store1(scratch + (j * WARPS + warp) * 4, of_warp)
    barrier()
    mine = scratch + gl.minimum(thread, OWN - 1) * (4 * WARPS)
    product = load1(mine)
    for warp in gl.static_range(1, WARPS):
        product += load1(mine + warp * 4)
    return product


@gluon.jit
def keep_projected(
    to, words, rms_eps, R: gl.constexpr, N: gl.constexpr, RMS: gl.constexpr, RANKS: gl.constexpr
):
    """Put dt, B and C, the sums of what came from all ranks, into shared memory, in float32."""
    a, b, c, d = sums_of_round(words, 0, 1, RANKS)
    a, b, c, d = rounded(a), rounded(b), rounded(c), rounded(d)
    element = gl.arange(0, THREADS, LINE) * 4
    if RMS:
        square = a * a + b * b + (c * c + d * d)
        of_dt = element < R
        of_B = (element >= R) & (element < R + N)
        of_C = (element >= R + N) & (element < R + 2 * N)
        dt = gl.rsqrt(gl.sum(gl.where(of_dt, square, 0.0), 0) / R + rms_eps)
        B = gl.rsqrt(gl.sum(gl.where(of_B, square, 0.0), 0) / N + rms_eps)
        C = gl.rsqrt(gl.sum(gl.where(of_C, square, 0.0), 0) / N + rms_eps)
        scale = gl.where(of_dt, dt, gl.where(of_B, B, C))
        a, b, c, d = a * scale, b * scale, c * scale, d * scale
    store4(to + element * 4, a, b, c, d)
    barrier()
