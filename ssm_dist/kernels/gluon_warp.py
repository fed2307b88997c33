"""A warp's share of a selective scan, with the tensor cores as movers of data (Gluon, for sm_90).

A warp owns 16 channels and their N states, in the layout of m16n8k8 products. Lane 4 g + i holds channels 2 g
and 2 g + 1, rows g and g + 8 of a product, and of their states the N / 4 from i N / 4 on. Tokens come eight
at a time in two halves; lane i of a quad loads and prepares tokens i and 4 + i alone, so that nothing is done
twice. Per token:

- dt goes around the quad by shuffle, then exp2(dt A) and one fma an element: the recurrence, in float32;
- the outer product dt x B that enters it comes from the tensor cores: dt x of four tokens, as a tf32 number
  and the rest of it (exact to 2^-21), times B with the rows of the other three tokens zeroed. B is exact in
  tf32, and is read once a warp, not once a lane;
- C . s is a product with eight tokens' C at once, of which this token's column is kept. The states are cut to
  tf32 here, and only here: 2e-4 of y at random, under the rounding of 16-bit outputs, and 3.5e-4 on average
  that RESTORED gives back.

The special-function unit bounds it: 16 + 3 operations a channel and token, with N = 16, keep it busy for 76
cycles a step of a warp, beside 60 instructions issued. EXTRA of every 16 exponentials become a polynomial.
A NaN or infinite dt x spoils up to three tokens before it, of the same channel and sequence.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ssm_dist.kernels.triton_common import LOG2_E, log1p_coefficient


@gluon.constexpr_function
def lanes(warps):
    """One element a lane: element 8 i + g of each 32 is lane 4 g + i's, so that g runs along memory."""
    bases = [[32 << k] for k in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout([], [[8], [16], [1], [2], [4]], bases, [], [32 * warps])


WORD = gl.constexpr(gl.pointer_type(gl.int32))
barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # the latter in Triton 3.6
RESTORED = gl.constexpr(1 + 2**-11 * 0.7213475)
"""Against what is lost when a mantissa m, of density 1 / m, loses its last 13 bits: 2^-11 / m on average."""


@gluon.constexpr_function
def _exp2_coefficient(k):
    """Polynomial of 2^f on [-1/2, 1/2], 2e-7 off at most and exact at 0; highest of 6 powers first.

    A decay near 1 counts as often as steps are small: an error there would add up.
    """
    return (
        0.001326472731307149, 0.009671512991189957, 0.05550733581185341, 0.24022242426872253,
        0.6931470036506653, 1.0,
    )[k]  # fmt: skip


@gluon.jit
def softplus(v):
    """That of `triton_common`."""
    e = gl.exp2(gl.abs(v) * -LOG2_E)
    p = gl.zeros_like(e)
    for k in gl.static_range(8):
        p = gl.fma(e, p, gl.full_like(e, log1p_coefficient(k)))
    return gl.fma(e, p, gl.maximum(v, 0.0))


@gluon.jit
def silu(v):
    """v * sigmoid(v) with the approximate reciprocal."""
    return v * gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + gl.exp2(v * -LOG2_E)], gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _exp2_by_fma(v):
    """2^v for v <= 0 without the special-function unit."""
    v = gl.maximum(v, -126.0)
    whole = v + 12582912.0  # 1.5 * 2^23: leaves the whole part in the lowest bits
    f = v - (whole - 12582912.0)
    p = gl.zeros_like(f)
    for k in gl.static_range(6):
        p = gl.fma(f, p, gl.full_like(f, _exp2_coefficient(k)))
    bits = p.to(gl.int32, bitcast=True) + (whole.to(gl.int32, bitcast=True) << 23)
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def unpack(word, HALF: gl.constexpr):
    """The two 16-bit numbers of an int32 in float32."""
    if HALF:
        low = (word & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
        high = (word >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    else:
        low = (word << 16).to(gl.float32, bitcast=True)
        high = (word & -65536).to(gl.float32, bitcast=True)
    return low, high


@gluon.constexpr_function
def _pack_assembly(half):
    return f"cvt.rn.{'f16x2' if half else 'bf16x2'}.f32 $0, $2, $1;"


@gluon.jit
def pack(low, high, HALF: gl.constexpr):
    """Two float32 numbers rounded to 16 bits, in an int32."""
    return gl.inline_asm_elementwise(
        _pack_assembly(HALF), "=r,f,f", [low, high], gl.int32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def product(a, b, c):
    """Rows a (16 x 8) times columns b (8 x 8) plus c, in tf32: 4, 2 and 4 registers of a lane."""
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3]],
        (gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def _product_assembly(half):
    kind = "f16" if half else "bf16"
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )


@gluon.jit
def product_of_16(a, b, c, HALF: gl.constexpr):
    """Rows a (16 x 16) times columns b (16 x 8) of 16 bits plus c: 4, 2 and 4 registers of a lane."""
    return gl.inline_asm_elementwise(
        _product_assembly(HALF), "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3]],
        (gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def _shuffle_assembly(mode, lane):
    return f"shfl.sync.{mode}.b32 $0, $1, {lane}, 0x1c03, 0xffffffff;"


@gluon.jit
def shuffle(v, MODE: gl.constexpr, LANE: gl.constexpr):
    """Within a quad, the value of lane LANE ("idx"), or of the lane whose number differs by LANE ("bfly")."""
    return gl.inline_asm_elementwise(
        _shuffle_assembly(MODE, LANE), "=f,f", [v], gl.float32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def _pair(pointer, wanted):
    """Two 16-bit numbers that are neighbours in memory, as an int32."""
    return gl.load(pointer.to(WORD), mask=wanted, other=0)


@gluon.jit
def _fetch(at, rows, g, i, inside, left, H: gl.constexpr, OUTPUT: gl.constexpr):
    """What a lane needs of eight tokens, packed: x, dt, z and B of both halves, and C."""
    near = inside & (i < left)
    far = inside & (i + 4 < left)
    x = (_pair(at[0], near), _pair(at[0] + 4 * rows[0], far))
    dt = (_pair(at[1], near), _pair(at[1] + 4 * rows[1], far))
    z, B, C = (), (), ()
    for h in gl.static_range(H // 2):
        B += (_pair(at[3] + 2 * h, i < left),)
    for h in gl.static_range(H // 2):
        B += (_pair(at[3] + 4 * rows[3] + 2 * h, i + 4 < left),)
    if OUTPUT:
        z = (_pair(at[2], near), _pair(at[2] + 4 * rows[2], far))
        for h in gl.static_range(H):
            C += (_pair(at[4] + 2 * h, g // 2 + g % 2 * 4 < left),)
    return x, dt, z, B, C


@gluon.jit
def _onward(at, rows):
    """The pointers eight tokens on."""
    there = ()
    for k in gl.static_range(5):
        there += (at[k] + 8 * rows[k],)
    return there


@gluon.jit
def _inputs(x, dt, bias, real):
    """dt of a lane's two channels at one token, 0 where there is none; dt x and what tf32 drops of it."""
    dt0 = gl.where(real, softplus(dt[0] + bias[0]), 0.0)
    dt1 = gl.where(real, softplus(dt[1] + bias[1]), 0.0)
    u0 = dt0 * x[0]
    u1 = dt1 * x[1]
    rest0 = u0 - (u0.to(gl.int32, bitcast=True) & -8192).to(gl.float32, bitcast=True)
    rest1 = u1 - (u1.to(gl.int32, bitcast=True) & -8192).to(gl.float32, bitcast=True)
    return (dt0, dt1), (u0, u1, rest0, rest1)


@gluon.jit
def decay(step, A, TURN: gl.constexpr, EXTRA: gl.constexpr):
    """exp2(step A), of which the EXTRA of every 16 turns go to the FMA pipes."""
    return _exp2_by_fma(step * A) if TURN * EXTRA % 16 < EXTRA else gl.exp2(step * A)


@gluon.jit
def _step(s, A, dt, u, B, i, LANE: gl.constexpr, H: gl.constexpr, EXTRA: gl.constexpr):
    """exp2(dt A) s + dt x B for the token that lane LANE of each quad holds."""
    zero = gl.zeros_like(dt[0])
    entering = ()
    for h in gl.static_range(H):
        b = gl.where(i == LANE, B[h], 0.0)
        entering += (product(u, (b, b), (zero, zero, zero, zero)),)
    step = (shuffle(dt[0], "idx", LANE), shuffle(dt[1], "idx", LANE))
    new = ()
    for k in gl.static_range(4 * H):  # by channel, tile of states, column
        remaining = decay(step[k // (2 * H)], A[k], LANE % 2 * 4 * H + k, EXTRA)
        new += (gl.fma(remaining, s[k], entering[k // 2 % H][k // (2 * H) * 2 + k % 2]),)
    return new


@gluon.jit
def read(s, C, H: gl.constexpr):
    """C . s of both channels with the C of two of the eight tokens: channel by channel."""
    zero = gl.zeros_like(s[0])
    y = (zero, zero, zero, zero)
    for h in gl.static_range(H):
        y = product((s[2 * h], s[2 * H + 2 * h], s[2 * h + 1], s[2 * H + 2 * h + 1]), (C[h], C[H + h]), y)
    return y


@gluon.jit
def advance(
    s, A, at, rows, y, y_row, bias, skip, lane, tokens,
    N: gl.constexpr, HALF: gl.constexpr, DEPTH: gl.constexpr, EXTRA: gl.constexpr, OUTPUT: gl.constexpr,
):  # fmt: skip
    """The states after `tokens` tokens; the output in y or, without OUTPUT, a lane's share of the sum of dt.

    at: pointers to x, dt, z, B, C of the lane's first token; rows: their strides; y, y_row: of its output;
    lane: g, i, the program's first channel in its group, whether the lane has channels.
    """
    H: gl.constexpr = N // 8
    g, i, _, inside = lane
    zero = gl.zeros_like(bias[0])
    passed = (zero, zero)
    ahead = _fetch(at, rows, g, i, inside, tokens, H, OUTPUT)
    further = ahead
    if DEPTH == 2:
        at = _onward(at, rows)
        further = _fetch(at, rows, g, i, inside, tokens - 8, H, OUTPUT)
    for left in range(tokens, 0, -8):
        xs, dts, zs, Bs, Cs = ahead
        at = _onward(at, rows)
        if DEPTH == 2:
            ahead = further
            further = _fetch(at, rows, g, i, inside, left - 16, H, OUTPUT)
        else:
            ahead = _fetch(at, rows, g, i, inside, left - 8, H, OUTPUT)
        C = ()
        if OUTPUT:
            for h in gl.static_range(H):
                C += unpack(Cs[h], HALF)
        for half in gl.static_range(2):
            x = unpack(xs[half], HALF)
            dt, u = _inputs(x, unpack(dts[half], HALF), bias, i + 4 * half < left)
            B = ()
            for h in gl.static_range(H // 2):
                B += unpack(Bs[half * (H // 2) + h], HALF)
            out = (zero, zero)
            for turn in gl.static_range(4):
                s = _step(s, A, dt, u, B, i, turn, H, EXTRA)
                if OUTPUT:
                    found = read(s, C, H)
                    mine = i == turn
                    out = (gl.where(mine, found[half], out[0]), gl.where(mine, found[2 + half], out[1]))
            if OUTPUT:
                z = unpack(zs[half], HALF)
                low = gl.fma(skip[0], x[0], out[0] * RESTORED) * silu(z[0])
                high = gl.fma(skip[1], x[1], out[1] * RESTORED) * silu(z[1])
                real = inside & (i + 4 * half < left)
                gl.store((y + 4 * half * y_row).to(WORD), pack(low, high, HALF), mask=real)
            else:
                passed = (passed[0] + dt[0], passed[1] + dt[1])
        if OUTPUT:
            y += 8 * y_row
    return s, passed
