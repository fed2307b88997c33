"""A decode step of one sequence through all layers of a Mamba model, in one kernel (Gluon, sm_90).

Kernel by kernel, memory is idle while each waits for the one before. Here P programs stay, each with its
share of every layer's channels and outputs: one warp streams weights through `gluon_ring`, the others work,
and hand vectors to each other, on one GPU or several, by `gluon_words`. Four vectors a layer: the
convolution's output; the products with x_proj, summed over ranks; the mixer's output; those with out_proj,
summed over ranks. The products with z pass while the first two are on their way.

A vector's words are used again two layers later. By then everybody has read them: nobody is two layers
ahead, since a layer's first inputs are out_proj's outputs from every program of every rank. So every program
must have some.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ssm_dist.kernels.gluon_ring import (
    WARPS,
    address_of,
    barrier,
    clear,
    fetch,
    inputs,
    load1,
    load2,
    multiply,
    open_barriers,
    store1,
    store2,
    store4,
    total,
    wait_for,
)
from ssm_dist.kernels.gluon_warp import LOG2_E, WORD, silu, softplus
from ssm_dist.kernels.gluon_words import LINE, THREADS, high, low, packed, poll, publish, rounded

NORM, IN, TAPS, CONV_BIAS, X, DT, DT_BIAS, A_LOG, SKIP, OUT = map(gl.constexpr, range(10))
"""Columns of the table."""
FIELDS = gl.constexpr(16)
BF16 = gl.constexpr(gl.pointer_type(gl.bfloat16))
FLOAT = gl.constexpr(gl.pointer_type(gl.float32))
PAIR = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [8, 1], [1, 0]))
"""(CHANNELS, n): four lanes a channel."""
CHANNEL = gl.constexpr(gl.SliceLayout(1, PAIR))
CHANNELS = gl.constexpr(64)
"""Of a program, at most."""
ROUND = gl.constexpr(4 * 256)
"""Numbers that the threads hold, four each."""
X_BYTES = gl.constexpr(4096)
"""Of the words of x_proj's outputs."""
FAILED = gl.constexpr(256)
"""The code of a wait for the first rank that failed; the next are the other ranks'."""
VECTOR = gl.constexpr(2048)
"""The words of other vectors are rounded up to a multiple of so many."""


@gluon.jit
def _field(table, layer, FIELD: gl.constexpr):
    """How far a layer's parameter is from the anchor, in words."""
    return gl.multiple_of(gl.load(table + (layer * FIELDS + FIELD)), 4)


@gluon.jit
def _fetch_all(
    ring, anchor, table, layers,
    P: gl.constexpr, H: gl.constexpr, D: gl.constexpr,
    CHUNKS: gl.constexpr, SLOTS: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """One warp: the pieces of in_proj's x rows, its z rows and out_proj's rows, layer by layer."""
    PARTS_IN: gl.constexpr = (H + 256 * CHUNKS - 1) // (256 * CHUNKS)
    PARTS_OUT: gl.constexpr = (D + 256 * CHUNKS - 1) // (256 * CHUNKS)
    OWN_IN: gl.constexpr = (D + P - 1) // P
    OWN_OUT: gl.constexpr = (H + P - 1) // P
    HALF: gl.constexpr = (OWN_IN + WARPS - 1) // WARPS * PARTS_IN
    ALL: gl.constexpr = 2 * HALF + (OWN_OUT + WARPS - 1) // WARPS * PARTS_OUT
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    base = anchor.to(gl.int64)
    program = gl.program_id(0)
    slot, phase, number = 0, 0, 0
    arrived, arrived_phase = 0, 0
    for layer in range(layers):
        inward = base + gl.load(table + (layer * FIELDS + IN)) * 4
        outward = base + gl.load(table + (layer * FIELDS + OUT)) * 4
        for piece in range(ALL):
            out = piece >= 2 * HALF
            gate = (piece >= HALF) & (piece < 2 * HALF)
            here = gl.where(out, piece - 2 * HALF, piece % HALF)
            parts, own = gl.where(out, PARTS_OUT, PARTS_IN), gl.where(out, OWN_OUT, OWN_IN)
            local = here // parts * WARPS + lane
            row = program * own + local
            exists = (local < own) & (row < gl.where(out, H, D))
            row = (row + gl.where(gate, D, 0)).to(gl.int64)
            width, begin = gl.where(out, 2 * D, 2 * H), here % parts * (CHUNKS * 512)
            source = gl.where(out, outward, inward) + row * width + begin
            bytes = gl.where(exists, gl.minimum(width - begin, CHUNKS * 512), 0)
            if number >= AHEAD:
                wait_for(ring[1] + arrived * 8, arrived_phase, lane)
                arrived_phase = gl.where(arrived == SLOTS - 1, arrived_phase ^ 1, arrived_phase)
                arrived = gl.where(arrived == SLOTS - 1, 0, arrived + 1)
            wait_for(ring[2] + slot * 8, phase ^ 1, lane)
            fetch(ring, slot, source, bytes, CHUNKS)
            number += 1
            phase = gl.where(slot == SLOTS - 1, phase ^ 1, phase)
            slot = gl.where(slot == SLOTS - 1, 0, slot + 1)


@gluon.jit
def _pairs(start, WIDTH: gl.constexpr, inside):
    """Numbers 4 t to 4 t + 3 of thread t from each round's part of (WIDTH,) bfloat16, as two words."""
    thread = gl.arange(0, THREADS, LINE)
    result = ()
    for k in gl.static_range((WIDTH + ROUND - 1) // ROUND):
        here = inside & (k * ROUND + thread * 4 < WIDTH)
        at = start + (k * (ROUND // 2) + thread * 2)
        result += ((gl.load(at, mask=here, other=0), gl.load(at + 1, mask=here, other=0)),)
    return result


@gluon.jit
def _four(start, k: gl.constexpr, WIDTH: gl.constexpr):
    """The numbers of `_pairs` in round k, of (WIDTH,) float32."""
    thread = gl.arange(0, THREADS, LINE)
    at = start + (k * ROUND + thread * 4)
    here = k * ROUND + thread * 4 < WIDTH
    return (
        gl.load(at, mask=here, other=0.0), gl.load(at + 1, mask=here, other=0.0),
        gl.load(at + 2, mask=here, other=0.0), gl.load(at + 3, mask=here, other=0.0),
    )  # fmt: skip


@gluon.jit
def _keep(to, pairs, WIDTH: gl.constexpr):
    """Put what the threads have of (WIDTH,) into shared memory, in order, for all of them."""
    thread = gl.arange(0, THREADS, LINE)
    for k in gl.static_range((WIDTH + ROUND - 1) // ROUND):
        store2(to + (k * THREADS + thread) * 8, pairs[k][0], pairs[k][1])
    barrier()


@gluon.jit
def _added(stream, words, WIDTH: gl.constexpr, RANKS: gl.constexpr):
    """The residual stream, by round four times (THREADS,), plus the sum of what came from all ranks."""
    ROUNDS: gl.constexpr = (WIDTH + ROUND - 1) // ROUND
    result = ()
    for k in gl.static_range(ROUNDS):
        a, b = low(words[2 * k]), high(words[2 * k])
        c, d = low(words[2 * k + 1]), high(words[2 * k + 1])
        for r in gl.static_range(1, RANKS):
            first, second = words[2 * (r * ROUNDS + k)], words[2 * (r * ROUNDS + k) + 1]
            a, b, c, d = a + low(first), b + high(first), c + low(second), d + high(second)
        old = stream[k]
        result += ((old[0] + a, old[1] + b, old[2] + c, old[3] + d),)
    return result


@gluon.jit
def _normed(stream, gains, WIDTH: gl.constexpr, eps):
    """The RMS norm of the residual stream, as `_pairs`."""
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
            packed(v[0] * scale * low(gain[0]), v[1] * scale * high(gain[0])),
            packed(v[2] * scale * low(gain[1]), v[3] * scale * high(gain[1])),
        ),)  # fmt: skip
    return result


@gluon.jit
def _window(anchor, table, layer, conv, channel, inside, conv_row):
    """Taps, bias and the last inputs of the convolution of some channels."""
    taps = anchor + _field(table, layer, TAPS) + channel * 2
    at = conv + channel
    return (
        gl.load(taps, mask=inside, other=0),
        gl.load(taps + 1, mask=inside, other=0),
        gl.load((anchor + _field(table, layer, CONV_BIAS)).to(BF16) + channel, mask=inside, other=0.0),
        gl.load(at, mask=inside, other=0.0),
        gl.load(at + conv_row, mask=inside, other=0.0),
        gl.load(at + 2 * conv_row, mask=inside, other=0.0),
    )


@gluon.jit
def _convolved(current, window, conv, channel, inside, conv_row):
    """silu of the convolution, which takes `current` into its state."""
    first, second, bias, lag3, lag2, lag1 = window
    at = conv + channel
    current = current.to(gl.bfloat16)
    gl.store(at, lag2, mask=inside)
    gl.store(at + conv_row, lag1, mask=inside)
    gl.store(at + 2 * conv_row, current, mask=inside)
    sum = bias.to(gl.float32) + low(first) * lag3.to(gl.float32) + high(first) * lag2.to(gl.float32)
    sum += low(second) * lag1.to(gl.float32) + high(second) * current.to(gl.float32)
    return rounded(silu(sum))


@gluon.jit
def _x_rows(start, first, P: gl.constexpr, D: gl.constexpr, WIDTH: gl.constexpr, OUTPUTS: gl.constexpr):
    """This program's rows of x_proj, every P-th from `first` on: `_pairs` of WIDTH of each's D numbers."""
    rows = ()
    for j in gl.static_range((OUTPUTS + P - 1) // P):
        row = first + j * P
        rows += (_pairs(start + row * (D // 2), WIDTH, row < OUTPUTS),)
    return rows


@gluon.jit
def _project(rows, u, scratch, P: gl.constexpr, D: gl.constexpr, OUTPUTS: gl.constexpr):
    """The products of `_x_rows` with u; thread j gets that of row j."""
    OWN: gl.constexpr = (OUTPUTS + P - 1) // P
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
def _keep_projected(
    to, words, rms_eps, R: gl.constexpr, N: gl.constexpr, RMS: gl.constexpr, RANKS: gl.constexpr
):
    """Put dt, B and C, the sums of what came from all ranks, into shared memory, in float32."""
    a, b, c, d = low(words[0]), high(words[0]), low(words[1]), high(words[1])
    for r in gl.static_range(1, RANKS):
        a, b = a + low(words[2 * r]), b + high(words[2 * r])
        c, d = c + low(words[2 * r + 1]), d + high(words[2 * r + 1])
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


@gluon.jit
def _work(
    ring, memory, anchor, table, hidden, residual, slots, counters, y, conv, ssm, words, shared, peers, rank,
    sharers, x_rank, waits, layers, eps, rms_eps, conv_layer, conv_slot, conv_row, ssm_layer, ssm_slot,
    P: gl.constexpr, H: gl.constexpr, D: gl.constexpr, R: gl.constexpr,
    N: gl.constexpr, HEADS: gl.constexpr, RMS: gl.constexpr, RANKS: gl.constexpr, SHARERS: gl.constexpr,
    CHUNKS: gl.constexpr, SLOTS: gl.constexpr, BEFORE_X: gl.constexpr, NORMED: gl.constexpr,
):  # fmt: skip
    """The other warps."""
    PARTS_IN: gl.constexpr = (H + 256 * CHUNKS - 1) // (256 * CHUNKS)
    PARTS_OUT: gl.constexpr = (D + 256 * CHUNKS - 1) // (256 * CHUNKS)
    OWN_IN: gl.constexpr = (D + P - 1) // P
    OWN_OUT: gl.constexpr = (H + P - 1) // P
    TURNS: gl.constexpr = (OWN_IN + WARPS - 1) // WARPS
    HOLDS_Y: gl.constexpr = D <= 5120  # else too many registers
    OUTPUTS: gl.constexpr = R + 2 * N
    OF_HEAD: gl.constexpr = P // HEADS  # programs
    WIDTH: gl.constexpr = D // HEADS
    X_SCOPE: gl.constexpr = "gpu" if SHARERS == 1 else "sys"
    H_BYTES: gl.constexpr = (H + VECTOR - 1) // VECTOR * VECTOR * 4
    D_BYTES: gl.constexpr = (D + VECTOR - 1) // VECTOR * VECTOR * 4
    SCOPE: gl.constexpr = "gpu" if RANKS == 1 else "sys"
    kept, wide, products = memory

    program = gl.program_id(0)
    thread = gl.arange(0, THREADS, LINE)
    own = gl.arange(0, CHANNELS, CHANNEL)
    n = gl.arange(0, N, gl.SliceLayout(0, PAIR))
    PAIRS_OF_DT: gl.constexpr = 64 if R <= 128 else 128
    pair = gl.arange(0, PAIRS_OF_DT, gl.SliceLayout(0, PAIR))
    channel = program * OWN_IN + own
    inside = (own < OWN_IN) & (channel < D)
    channel = gl.where(inside, channel, 0)
    cell = channel[:, None] * N + n[None, :]
    always = program >= 0
    patient = (waits[0], 2 * waits[1])  # for what waits for other ranks itself

    place = (program * 0, program * 0)
    so_far = gl.load(counters + program)
    head = program // OF_HEAD
    slot = gl.load(slots).to(gl.int64)
    conv += slot * conv_slot
    ssm += slot * ssm_slot
    gains = _pairs(anchor + _field(table, 0, NORM), H, always)
    normed = _pairs(hidden.to(WORD), H, always)
    stream = ()
    if residual is None:
        for k in gl.static_range((H + ROUND - 1) // ROUND):
            first, second = normed[k][0], normed[k][1]
            stream += ((low(first), high(first), low(second), high(second)),)
        normed = _normed(stream, gains, H, eps)
    else:
        for k in gl.static_range((H + ROUND - 1) // ROUND):
            stream += (_four(residual, k, H),)
    _keep(kept, normed, H)

    for layer in range(layers):
        exchange = so_far + layer
        tag, odd = exchange & 0xFFFF, exchange & 1
        u_words, y_words = words + odd * D_BYTES, words + (2 + odd) * D_BYTES
        x_part = odd * (RANKS * X_BYTES) + head * (OUTPUTS * 4)
        h_part = 2 * RANKS * X_BYTES + odd * (RANKS * H_BYTES)

        window = _window(anchor, table, layer, conv, channel, inside, conv_row)
        x = inputs(kept, PARTS_IN, CHUNKS)
        for i in range(TURNS):
            place = multiply(place, ring, x, products + i * 32, PARTS_IN, CHUNKS, SLOTS, True)
        barrier()
        u = _convolved(total(products + own * 4), window, conv, channel, inside, conv_row)
        publish(u_words + channel.to(gl.int64) * 4, u, tag, inside, "gpu")

        x_start = anchor + _field(table, layer, X) + head * (WIDTH // 2)
        rows = _x_rows(x_start, program % OF_HEAD, OF_HEAD, D, WIDTH, OUTPUTS)
        z_at = products + 4 * CHANNELS * WARPS
        for i in range(BEFORE_X):
            place = multiply(place, ring, x, z_at + i * 32, PARTS_IN, CHUNKS, SLOTS, True)
        whole = poll(u_words + head * (WIDTH * 4), 0, WIDTH, tag, patient, FAILED + rank, WIDTH, 1, "gpu")
        share = _project(rows, whole, wide, OF_HEAD, WIDTH, OUTPUTS)
        output = program % OF_HEAD + thread * OF_HEAD
        real = (thread < (OUTPUTS + OF_HEAD - 1) // OF_HEAD) & (output < OUTPUTS)
        for r in gl.static_range(SHARERS):
            to = sharers[r] + (x_part + x_rank * X_BYTES + output.to(gl.int64) * 4)
            publish(to, share, tag, real, X_SCOPE)

        before = gl.load(ssm + cell, mask=inside[:, None], other=0.0)
        rates = gl.load(
            (anchor + _field(table, layer, A_LOG)).to(FLOAT) + cell, mask=inside[:, None], other=0.0
        )
        skip = gl.load((anchor + _field(table, layer, SKIP)).to(FLOAT) + channel, mask=inside, other=0.0)
        bias = gl.load((anchor + _field(table, layer, DT_BIAS)).to(FLOAT) + channel, mask=inside, other=0.0)
        dt_row = gl.multiple_of(channel * (R // 2), 4)
        expand = gl.load(
            anchor + _field(table, layer, DT) + (dt_row[:, None] + pair[None, :]),
            mask=inside[:, None] & (pair < R // 2)[None, :], other=0,
        )  # fmt: skip
        for i in range(BEFORE_X, TURNS):
            place = multiply(place, ring, x, z_at + i * 32, PARTS_IN, CHUNKS, SLOTS, True)
        barrier()
        gate = silu(rounded(total(z_at + own * 4)))
        rates = -gl.exp2(rates * LOG2_E) * LOG2_E

        blamed = FAILED + rank - x_rank
        # where not all ranks share, one may wait for a rank that this one has heard
        limits = patient if SHARERS < RANKS else waits
        given = poll(shared + x_part, X_BYTES, OUTPUTS, tag, limits, blamed, OUTPUTS, SHARERS, X_SCOPE)
        _keep_projected(wide, given, rms_eps, R, N, RMS, SHARERS)
        dt = load2(wide + pair * 8)
        B, C = load1(wide + (R + n) * 4), load1(wide + (R + N + n) * 4)
        dot = low(expand) * dt[0][None, :] + high(expand) * dt[1][None, :]
        step = softplus(gl.sum(gl.where((pair < R // 2)[None, :], dot, 0.0), 1) + bias)
        state = gl.exp2(step[:, None] * rates) * before.to(gl.float32) + (step * u)[:, None] * B[None, :]
        gl.store(ssm + cell, state.to(ssm.dtype.element_ty), mask=inside[:, None])
        out = (gl.sum(state * C[None, :], 1) + skip * u) * gate
        publish(y_words + channel.to(gl.int64) * 4, out, tag, inside, "gpu")
        conv += conv_layer
        ssm += ssm_layer

        gains = _pairs(anchor + _field(table, layer + 1, NORM), H, always)
        whole = poll(y_words, 0, D, tag, patient, FAILED + rank, D, 1, "gpu")
        gathered = ()
        for k in gl.static_range((D + ROUND - 1) // ROUND):
            gathered += ((whole[2 * k], whole[2 * k + 1]),)
        _keep(kept, gathered, D)
        v = kept
        if HOLDS_Y:
            v = inputs(kept, PARTS_OUT, CHUNKS)
        for i in range((OWN_OUT + WARPS - 1) // WARPS):
            place = multiply(place, ring, v, products + i * 32, PARTS_OUT, CHUNKS, SLOTS, HOLDS_Y)
        barrier()
        number = program * OWN_OUT + thread
        share = total(products + thread % CHANNELS * 4)
        for r in gl.static_range(RANKS):
            to = peers[r] + (h_part + rank * H_BYTES + number.to(gl.int64) * 4)
            publish(to, share, tag, (thread < OWN_OUT) & (number < H), SCOPE)

        came = poll(shared + h_part, H_BYTES, H, tag, waits, FAILED, H, RANKS, SCOPE)
        stream = _added(stream, came, H, RANKS)
        normed = _normed(stream, gains, H, eps)
        _keep(kept, normed, H)

    if program == 0:
        for k in gl.static_range((H + ROUND - 1) // ROUND):
            exists = k * ROUND + thread * 4 < H
            if NORMED:
                to = y.to(WORD) + (k * (ROUND // 2) + thread * 2)
                for i in gl.static_range(2):
                    gl.store(to + i, normed[k][i], mask=exists)
            else:
                for i in gl.static_range(4):
                    gl.store(y + (k * ROUND + thread * 4 + i), stream[k][i], mask=exists)
    gl.store(counters + program, so_far + layers)


@gluon.jit(do_not_specialize=["rank", "x_rank", "layers"])
def layers_kernel(
    anchor, table, hidden, residual, slots, counters, y, conv, ssm, words, shared, peers, rank, sharers,
    x_rank, error, limit, layers, eps, rms_eps, conv_layer, conv_slot, conv_row, ssm_layer, ssm_slot,
    P: gl.constexpr, H: gl.constexpr, D: gl.constexpr, R: gl.constexpr,
    N: gl.constexpr, HEADS: gl.constexpr, RMS: gl.constexpr, RANKS: gl.constexpr, SHARERS: gl.constexpr,
    CHUNKS: gl.constexpr, SLOTS: gl.constexpr, BEFORE_X: gl.constexpr, AHEAD: gl.constexpr,
    NORMED: gl.constexpr,
):  # fmt: skip
    """One of P programs, all at once on the GPU.

    table, (layers + 1, FIELDS) int64: how far parameters are from the anchor, an int32 pointer; the last row
    has the norm of NORMED. hidden: (H,) bfloat16, the residual stream, or with a residual, (H,) float32, the
    first layer's normed input. y: (H,), the last norm of the stream in bfloat16 if NORMED, else the stream in
    float32. conv, ssm: states of the first layer. words, shared: addresses of the words of this GPU, and of
    those that ranks send; peers: the latter of each rank; sharers: of those that have a part of this rank's
    heads. counters: (P,), layers so far. BEFORE_X: turns of z before x_proj.
    """
    D_BYTES: gl.constexpr = (D + VECTOR - 1) // VECTOR * VECTOR * 2
    H_BYTES: gl.constexpr = (H + VECTOR - 1) // VECTOR * VECTOR * 2
    KEPT: gl.constexpr = H_BYTES if H_BYTES > D_BYTES else D_BYTES
    RING: gl.constexpr = SLOTS * WARPS * (CHUNKS * 512 + 64)
    PRODUCTS: gl.constexpr = 2 * WARPS * CHANNELS * 4
    BYTES: gl.constexpr = RING + KEPT + 4 * ROUND + PRODUCTS + 16 * SLOTS
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    arena = gl.allocate_shared_memory(gl.int32, [(BYTES + 4095) // 4096, 1024], FLAT)
    start = address_of(arena)
    if H % (256 * CHUNKS) or D % (256 * CHUNKS):
        clear(start, (RING + 4095) // 4096 * 4096)
    kept = start + RING
    wide = kept + KEPT
    products = wide + 4 * ROUND
    arrived = products + PRODUCTS
    ring = (start, arrived, arrived + 8 * SLOTS)
    open_barriers(arrived, 2 * SLOTS)
    waits = (error, limit.to(gl.int64))
    gl.warp_specialize(
        [
            (_work, (
                ring, (kept, wide, products), anchor, table, hidden, residual, slots, counters, y, conv, ssm,
                words, shared, peers, rank, sharers, x_rank, waits, layers, eps, rms_eps, conv_layer,
                conv_slot, conv_row, ssm_layer, ssm_slot, P, H, D, R, N, HEADS, RMS, RANKS, SHARERS, CHUNKS,
                SLOTS, BEFORE_X, NORMED,
            )),
            (_fetch_all, (ring, anchor, table, layers, P, H, D, CHUNKS, SLOTS, AHEAD)),
        ],
        [1], [48],
    )  # fmt: skip
    # Shared memory is somebody else's after its last use: here, in a branch that is never taken.
    if limit < 0:
        gl.store(counters + gl.maximum(arena.index(0).load(LINE), 0), 0)
