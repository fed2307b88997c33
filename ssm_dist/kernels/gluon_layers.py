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

from ssm_dist.kernels import gluon_layers_form as form
from ssm_dist.kernels.gluon_layers_fetch import fetch_all
from ssm_dist.kernels.gluon_layers_steps import (
    A_LOG,
    CHANNEL,
    CHANNELS,
    DT,
    DT_BIAS,
    FAILED,
    FLOAT,
    NORM,
    PAIR,
    ROUND,
    SKIP,
    X,
    add_sums,
    convolve,
    field,
    keep,
    keep_projected,
    load_fours,
    load_pairs,
    load_window,
    load_x_rows,
    norm,
    project,
    store_rounds,
    widened,
)
from ssm_dist.kernels.gluon_ring import WARPS, inputs, multiply, open_barriers, row_bytes, total
from ssm_dist.kernels.gluon_shared import address_of, clear, load1, load2
from ssm_dist.kernels.gluon_warp import LOG2_E, WORD, barrier, silu, softplus
from ssm_dist.kernels.gluon_words import LINE, THREADS, high, low, poll, publish, rounded

VECTOR = gl.constexpr(form.VECTOR)
X_BYTES = gl.constexpr(4 * form.X_WORDS)
SCRATCH = gl.constexpr(form.SCRATCH_BYTES)
PRODUCTS = gl.constexpr(form.PRODUCT_BYTES)


@gluon.jit
def _work(
    ring, memory, anchor, table, hidden, residual, slots, counters, y, conv, ssm, words, shared, peers, rank,
    sharers, x_rank, waits, layers, eps, rms_eps, conv_layer, conv_slot, conv_row, ssm_layer, ssm_slot,
    P: gl.constexpr, H: gl.constexpr, D: gl.constexpr, R: gl.constexpr,
    N: gl.constexpr, HEADS: gl.constexpr, RMS: gl.constexpr, RANKS: gl.constexpr, SHARERS: gl.constexpr,
    CHUNKS: gl.constexpr, SLOTS: gl.constexpr, BEFORE_X: gl.constexpr, NORMED: gl.constexpr,
):  # fmt: skip
    """The warps that multiply, and do all else that a layer takes."""
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
    gains = load_pairs(anchor + field(table, 0, NORM), H, always)
    normed = load_pairs(hidden.to(WORD), H, always)
    if residual is None:
        stream = widened(normed, H)
        normed = norm(stream, gains, H, eps)
    else:
        stream = load_fours(residual, H)
    keep(kept, normed, H)

    for layer in range(layers):
        exchange = so_far + layer
        tag, odd = exchange & 0xFFFF, exchange & 1
        u_words, y_words = words + odd * D_BYTES, words + (2 + odd) * D_BYTES
        x_part = odd * (RANKS * X_BYTES) + head * (OUTPUTS * 4)
        h_part = 2 * RANKS * X_BYTES + odd * (RANKS * H_BYTES)

        window = load_window(anchor, table, layer, conv, channel, inside, channel, inside, conv_row)
        x = inputs(kept, PARTS_IN, CHUNKS)
        for i in range(TURNS):
            place = multiply(place, ring, x, products + i * 32, PARTS_IN, CHUNKS, SLOTS, True)
        barrier()
        u = convolve(total(products + own * 4), window, conv, channel, inside, conv_row)
        publish(u_words + channel.to(gl.int64) * 4, u, tag, inside, "gpu")

        x_start = anchor + field(table, layer, X) + head * (WIDTH // 2)
        rows = load_x_rows(x_start, program % OF_HEAD, OF_HEAD, D, WIDTH, OUTPUTS)
        z_at = products + PRODUCTS // 2
        for i in range(BEFORE_X):
            place = multiply(place, ring, x, z_at + i * 32, PARTS_IN, CHUNKS, SLOTS, True)
        whole = poll(u_words + head * (WIDTH * 4), 0, tag, patient, FAILED + rank, WIDTH, 1, "gpu")
        share = project(rows, whole, wide, OF_HEAD, WIDTH, OUTPUTS)
        output = program % OF_HEAD + thread * OF_HEAD
        real = (thread < (OUTPUTS + OF_HEAD - 1) // OF_HEAD) & (output < OUTPUTS)
        for r in gl.static_range(SHARERS):
            to = sharers[r] + (x_part + x_rank * X_BYTES + output.to(gl.int64) * 4)
            publish(to, share, tag, real, X_SCOPE)

        before = gl.load(ssm + cell, mask=inside[:, None], other=0.0)
        rates = gl.load(
            (anchor + field(table, layer, A_LOG)).to(FLOAT) + cell, mask=inside[:, None], other=0.0
        )
        skip = gl.load((anchor + field(table, layer, SKIP)).to(FLOAT) + channel, mask=inside, other=0.0)
        bias = gl.load((anchor + field(table, layer, DT_BIAS)).to(FLOAT) + channel, mask=inside, other=0.0)
        dt_row = gl.multiple_of(channel * (R // 2), 4)
        expand = gl.load(
            anchor + field(table, layer, DT) + (dt_row[:, None] + pair[None, :]),
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
        given = poll(shared + x_part, X_BYTES, tag, limits, blamed, OUTPUTS, SHARERS, X_SCOPE)
        keep_projected(wide, given, rms_eps, R, N, RMS, SHARERS)
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

        gains = load_pairs(anchor + field(table, layer + 1, NORM), H, always)
        whole = poll(y_words, 0, tag, patient, FAILED + rank, D, 1, "gpu")
        gathered = ()
        for k in gl.static_range((D + ROUND - 1) // ROUND):
            gathered += ((whole[2 * k], whole[2 * k + 1]),)
        keep(kept, gathered, D)
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

        came = poll(shared + h_part, H_BYTES, tag, waits, FAILED, H, RANKS, SCOPE)
        stream = add_sums(stream, came, H, RANKS)
        normed = norm(stream, gains, H, eps)
        keep(kept, normed, H)

    if program == 0:
        if NORMED:
            store_rounds(y.to(WORD), normed, 2, H)
        else:
            store_rounds(y, stream, 4, H)
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
    RING: gl.constexpr = SLOTS * WARPS * row_bytes(CHUNKS)
    BYTES: gl.constexpr = RING + KEPT + SCRATCH + PRODUCTS + 16 * SLOTS
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    arena = gl.allocate_shared_memory(gl.int32, [(BYTES + 4095) // 4096, 1024], FLAT)
    start = address_of(arena)
    if H % (256 * CHUNKS) or D % (256 * CHUNKS):
        clear(start, (RING + 4095) // 4096 * 4096)
    kept = start + RING
    wide = kept + KEPT
    products = wide + SCRATCH
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
            (fetch_all, (ring, anchor, table, layers, P, H, D, CHUNKS, SLOTS, AHEAD)),
        ],
        [1], [48],
    )  # fmt: skip
    # Shared memory is somebody else's after its last use: here, in a branch that is never taken.
    if limit < 0:
        gl.store(counters + gl.maximum(arena.index(0).load(LINE), 0), 0)
