"""The warp's share of `gluon_warp` with its inputs streamed through shared memory (Gluon, sm_90, 16 states).

Loads into registers leave the compiler free to sink them to where they are needed, where every eight tokens
wait for memory. Asynchronous copies cannot sink: a lane copies 16 bytes at a time, STAGES - 1 tiles of eight
tokens ahead, in three instructions a tile, and holds no register meanwhile. A block is one warp, so that no
warp waits for another, and its barriers are free.

The arithmetic is that of `gluon_warp`, but for two things. In bfloat16, dt x enters as two bfloat16 numbers
(2.5e-6 of it is lost on average), which halves the products' operands. And the order is a pipeline: while a
token enters the state, the decays of the next one are computed, and while four tokens do, the inputs of the
next four are prepared.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ssm_dist.kernels.gluon_warp import (
    RESTORED,
    WORD,
    decay,
    lanes,
    pack,
    product,
    read,
    shuffle,
    silu,
    softplus,
    unpack,
)

TWICE_LOW = gl.constexpr("prmt.b32 $0, $1, $1, 0x1010;")
TWICE_HIGH = gl.constexpr("prmt.b32 $0, $1, $1, 0x3232;")


@gluon.jit
def _product_of_pairs(a, b):
    """Rows a (16 x 8) times columns b (8 x 8) of bfloat16 pairs: 2, 1 and 4 registers of a lane."""
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
        "{$0, $1, $2, $3}, {$4, $5}, {$6}, {$7, $7, $7, $7};",
        "=f,=f,=f,=f,r,r,r,f",
        [a[0], a[1], b, gl.zeros_like(a[0]).to(gl.float32)],
        (gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _factors(u0, u1, HALF: gl.constexpr):
    """dt x of a lane's two channels as rows of a product: the rounded numbers, and what that drops."""
    if HALF:
        rest0 = u0 - (u0.to(gl.int32, bitcast=True) & -8192).to(gl.float32, bitcast=True)
        rest1 = u1 - (u1.to(gl.int32, bitcast=True) & -8192).to(gl.float32, bitcast=True)
        factors = (u0, u1, rest0, rest1)
    else:
        low, high = unpack(pack(u0, u1, HALF), HALF)
        factors = (pack(low, u0 - low, HALF), pack(high, u1 - high, HALF))
    return factors


@gluon.jit
def _columns(word, HALF: gl.constexpr):
    """B of a lane's token as columns of a product, for two states."""
    if HALF:
        columns = unpack(word, HALF)
    else:
        columns = (
            gl.inline_asm_elementwise(TWICE_LOW, "=r,r", [word], gl.int32, is_pure=True, pack=1),
            gl.inline_asm_elementwise(TWICE_HIGH, "=r,r", [word], gl.int32, is_pure=True, pack=1),
        )
    return columns


@gluon.jit
def _entering(u, B, mine, HALF: gl.constexpr):
    """dt x B of the token of the lanes that are `mine`."""
    result = ()
    for h in gl.static_range(2):
        b = gl.where(mine, B[h], gl.zeros_like(B[h]))
        if HALF:
            zero = gl.zeros_like(b)
            result += (product(u, (b, b), (zero, zero, zero, zero)),)
        else:
            result += (_product_of_pairs(u, b),)
    return result


@gluon.jit
def _prepare(inputs, matrices, bias, real, PART: gl.constexpr, HALF: gl.constexpr):
    """Of four of a tile's tokens, one a lane: dt, dt x and B as factors. Where there is none, dt is 0."""
    LANES: gl.constexpr = lanes(1)
    x = unpack(inputs.slice(32 * PART, 32).load(LANES), HALF)
    dt = unpack(inputs.slice(64 + 32 * PART, 32).load(LANES), HALF)
    B = _columns(matrices.slice(32 * PART, 32).load(LANES), HALF)
    dt0 = gl.where(real, softplus(dt[0] + bias[0]), 0.0)
    dt1 = gl.where(real, softplus(dt[1] + bias[1]), 0.0)
    return (dt0, dt1), _factors(dt0 * x[0], dt1 * x[1], HALF), B


@gluon.jit
def _decays(A, dt, LANE: gl.constexpr, EXTRA: gl.constexpr):
    """exp2(dt A) for the token that lane LANE of each quad holds."""
    step = (shuffle(dt[0], "idx", LANE), shuffle(dt[1], "idx", LANE))
    decays = ()
    for k in gl.static_range(8):
        decays += (decay(step[k // 4], A[k], LANE % 2 * 8 + k, EXTRA),)
    return decays


@gluon.jit
def _load_C(matrices, HALF: gl.constexpr):
    """Of eight tokens, as columns of products with the states: four states of one token a lane."""
    PAIRS: gl.constexpr = gl.DistributedLinearLayout([[1]], [[2], [4], [8], [16], [32]], [], [], [64])
    low, high = gl.split(matrices.slice(64, 64).load(PAIRS).reshape([32, 2]))
    low = gl.convert_layout(low.reshape([8, 4]).trans().reshape([32]), lanes(1), assert_trivial=True)
    high = gl.convert_layout(high.reshape([8, 4]).trans().reshape([32]), lanes(1), assert_trivial=True)
    return unpack(low, HALF) + unpack(high, HALF)


@gluon.jit
def _fill(stage, buffers, pointers, tokens, channels, left, OUTPUT: gl.constexpr):
    """Start copying a tile of which `left` tokens are real; the rest becomes zeros."""
    for k in gl.static_range(3 if OUTPUT else 2):
        async_copy.async_copy_global_to_shared(
            buffers[k].index(stage), pointers[k], channels[k] & (tokens[k] < left)
        )
    async_copy.commit_group()


@gluon.jit
def _onward(pointers, steps):
    return (pointers[0] + steps[0], pointers[1] + steps[1], pointers[2] + steps[2])


@gluon.jit
def _open(sources, rows, start, group_channels, tokens, STAGES: gl.constexpr, OUTPUT: gl.constexpr):
    """Start copying the first tiles, from sources: pointers to x, dt, z of the first token and group, B, C.

    A tile in shared memory, in words of two numbers: x of eight tokens, then dt; B, then C in the order in
    which lanes want its tokens, 0, 4, 1, 5, 2, 6, 3, 7; and z. C and z only for an OUTPUT.
    """
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    word = gl.arange(0, 128, gl.BlockedLayout([4], [32], [1], [0]))
    gate_word = gl.arange(0, 64, gl.BlockedLayout([2], [32], [1], [0]))
    token = word // 8 % 8
    second = word >= 64
    C_token = token // 2 + token % 2 * 4
    words = (
        gl.multiple_of(rows[0] // 2, 4),
        gl.multiple_of(rows[1] // 2, 4),
        gl.multiple_of(rows[2] // 2, 4),
        gl.multiple_of(rows[3] // 2, 4),
        gl.multiple_of(rows[4] // 2, 4),
    )
    start_word = gl.multiple_of(start // 2, 8)
    at = word % 8 + start_word
    pointers = (
        gl.where(second, sources[1].to(WORD), sources[0].to(WORD))
        + (token * gl.where(second, words[1], words[0]) + at),
        gl.where(second, sources[4].to(WORD), sources[3].to(WORD))
        + (gl.where(second, C_token * words[4], token * words[3]) + word % 8),
        sources[2].to(WORD) + (gate_word // 8 * words[2] + gate_word % 8 + start_word),
    )
    steps = (
        gl.where(second, 8 * words[1], 8 * words[0]),
        gl.where(second, 8 * words[4], 8 * words[3]),
        8 * words[2],
    )
    filled = (token, gl.where(second, C_token, token), gate_word // 8)
    channels = (
        start + word // 4 % 2 * 8 < group_channels,
        word >= 0 if OUTPUT else word < 64,
        start + gate_word // 4 % 2 * 8 < group_channels,
    )
    inputs = gl.allocate_shared_memory(gl.int32, [STAGES, 128], FLAT)
    matrices = gl.allocate_shared_memory(gl.int32, [STAGES, 128], FLAT)
    gates = gl.allocate_shared_memory(gl.int32, [STAGES, 64], FLAT)
    buffers = (inputs, matrices, gates)
    for k in gl.static_range(STAGES - 1):
        _fill(k, buffers, pointers, filled, channels, tokens - 8 * k, OUTPUT)
        pointers = _onward(pointers, steps)
    return buffers, pointers, steps, filled, channels


@gluon.jit
def stream(
    s, A, sources, rows, y, y_row, bias, skip, lane, group_channels, tokens,
    HALF: gl.constexpr, STAGES: gl.constexpr, EXTRA: gl.constexpr, OUTPUT: gl.constexpr,
):  # fmt: skip
    """As `gluon_warp.advance`, from pointers to x, dt and z of the first token and group, B and C."""
    LANES: gl.constexpr = lanes(1)
    _, i, start, inside = lane
    buffers, pointers, steps, filled, channels = _open(
        sources, rows, start, group_channels, tokens, STAGES, OUTPUT
    )
    inputs, matrices, gates = buffers
    zero = gl.zeros_like(bias[0])
    passed = (zero, zero)
    async_copy.wait_group(STAGES - 2)
    stage = 0
    dt, u, B = _prepare(inputs.index(0), matrices.index(0), bias, i < tokens, 0, HALF)
    for left in range(tokens, 0, -8):
        async_copy.wait_group(STAGES - 3)
        free = gl.where(stage == 0, STAGES - 1, stage - 1)
        _fill(free, buffers, pointers, filled, channels, left - 8 * (STAGES - 1), OUTPUT)
        pointers = _onward(pointers, steps)
        following = gl.where(stage == STAGES - 1, 0, stage + 1)
        columns = ()
        if OUTPUT:
            columns = _load_C(matrices.index(stage), HALF)
        for half in gl.static_range(2):
            ahead = stage if half == 0 else following
            dt_ahead, u_ahead, B_ahead = _prepare(
                inputs.index(ahead), matrices.index(ahead), bias, i + 4 < left - 4 * half, 1 - half, HALF
            )
            out = (zero, zero)
            decays = _decays(A, dt, 0, EXTRA)
            for turn in gl.static_range(4):
                entering = _entering(u, B, i == turn, HALF)
                now = decays
                if turn < 3:
                    decays = _decays(A, dt, turn + 1, EXTRA)
                new = ()
                for k in gl.static_range(8):
                    new += (gl.fma(now[k], s[k], entering[k // 2 % 2][k // 4 * 2 + k % 2]),)
                s = new
                if OUTPUT:
                    found = read(s, columns, 2)
                    mine = i == turn
                    out = (gl.where(mine, found[half], out[0]), gl.where(mine, found[2 + half], out[1]))
            if OUTPUT:
                x = unpack(inputs.index(stage).slice(32 * half, 32).load(LANES), HALF)
                z = unpack(gates.index(stage).slice(32 * half, 32).load(LANES), HALF)
                low = gl.fma(skip[0], x[0], out[0] * RESTORED) * silu(z[0])
                high = gl.fma(skip[1], x[1], out[1] * RESTORED) * silu(z[1])
                real = inside & (i + 4 * half < left)
                gl.store((y + 4 * half * y_row).to(WORD), pack(low, high, HALF), mask=real)
            else:
                passed = (passed[0] + dt[0], passed[1] + dt[1])
            dt, u, B = dt_ahead, u_ahead, B_ahead
        if OUTPUT:
            y += 8 * y_row
        stage = following
    return s, passed
