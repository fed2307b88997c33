"""A decode step of a few sequences through all layers of a Mamba model, in one kernel (Gluon, sm_90).

As `gluon_layers`, but what each program there has a copy of would be too much here. A program owns its
columns of the residual stream. It hands the others its columns times the norm's weight, and their squares'
sums; the norm's scale follows from these, and is applied to in_proj's outputs. x_proj is multiplied where its
input is, and each output's parts are added up by one program. Of out_proj a program has one part of the width
and as many times more rows, so that it needs that part of the mixer's output only; who owns a column adds up
the parts, those of all ranks at once.

Three vectors a layer go to all programs or some (the columns, x_proj's outputs, the mixer's output) as words
of `gluon_words`, three kinds of sums to one as wide words.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ssm_dist.kernels import gluon_layers_form as form
from ssm_dist.kernels.gluon_layers_fetch import fetch_all
from ssm_dist.kernels.gluon_layers_few_exchange import find_scales, receive, receive_wide, send
from ssm_dist.kernels.gluon_layers_few_steps import (
    convolve_tile,
    input_products,
    load_dt_rows,
    load_x_columns,
    over_sources,
    prefetch,
    rms_scales,
    step_products,
    tile_layout,
)
from ssm_dist.kernels.gluon_layers_steps import (
    A_LOG,
    BF16,
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
    field,
    load_window,
    sums_of_round,
)
from ssm_dist.kernels.gluon_ring import WARPS, inputs_of, multiply_few, open_barriers, row_bytes, total
from ssm_dist.kernels.gluon_shared import address_of, load1, load_half, store1, store2, store_half
from ssm_dist.kernels.gluon_warp import LOG2_E, barrier, pack, silu, softplus
from ssm_dist.kernels.gluon_words import (
    LINE,
    THREADS,
    poll,
    poll_sources,
    publish,
    publish_wide,
    publish_wides,
    rounded,
)

few_places = gluon.constexpr_function(form.few_places)
INPUT_STRIDE = gl.constexpr(form.INPUT_STRIDE)


@gluon.jit
def _work_few(
    ring, memory, anchor, table, hidden, slots, counters, y, conv, ssm, words, shared, peers, rank, waits,
    layers, count, eps, rms_eps, conv_layer, conv_slot, conv_row, ssm_layer, ssm_slot,
    P: gl.constexpr, H: gl.constexpr, D: gl.constexpr, R: gl.constexpr, N: gl.constexpr, RMS: gl.constexpr,
    RANKS: gl.constexpr, CHUNKS: gl.constexpr, SLOTS: gl.constexpr, BEFORE_X: gl.constexpr,
    SEQ: gl.constexpr,
):  # fmt: skip
    """The warps that multiply, and do all else that a layer takes."""
    WIDE: gl.constexpr = 256 * CHUNKS  # numbers of a part
    PARTS_IN: gl.constexpr = H // WIDE
    PARTS_OUT: gl.constexpr = D // WIDE
    OWN_IN: gl.constexpr = (D + P - 1) // P
    OWN_OUT: gl.constexpr = (H + P - 1) // P
    ROWS_OUT: gl.constexpr = OWN_OUT * PARTS_OUT
    TURNS: gl.constexpr = (OWN_IN + WARPS - 1) // WARPS
    OUTPUTS: gl.constexpr = R + 2 * N
    OWN_X: gl.constexpr = (OUTPUTS + P - 1) // P
    HOLDS_COLUMNS: gl.constexpr = OUTPUTS * OWN_IN <= 8192  # else too many registers
    ROUNDS_X: gl.constexpr = (P * OWN_X + 16 * WARPS - 1) // (16 * WARPS)
    COLUMNS: gl.constexpr = (ROWS_OUT + WARPS - 1) // WARPS * WARPS
    TILE: gl.constexpr = tile_layout(SEQ)
    SCOPE: gl.constexpr = "gpu" if RANKS == 1 else "sys"
    X_BYTES: gl.constexpr = SEQ * OUTPUTS * 4
    STATE_BYTES: gl.constexpr = ssm.dtype.element_ty.primitive_bitwidth // 8
    H_BYTES: gl.constexpr = SEQ * H * 4
    STREAM_BYTES: gl.constexpr = H_BYTES + 2 * P * SEQ * 4  # with the squares' sums
    kept, outs, sums, totals, steps, products, entered, inputs, gates, scales = memory

    program = gl.program_id(0)
    thread = gl.arange(0, THREADS, LINE)
    lane, warp = thread % 32, thread // 32
    sequence = gl.minimum(warp, SEQ - 1)
    patient = (waits[0], 2 * waits[1])  # for what waits for other ranks itself
    blamed = FAILED + rank
    squares_at = kept + 2 * SEQ * H + 64 * SEQ
    y_words = words + 2 * STREAM_BYTES
    x_sums = y_words + 2 * SEQ * D * 4

    # channels, with states and with sequences
    own = gl.arange(0, CHANNELS, CHANNEL)
    n = gl.arange(0, N, gl.SliceLayout(0, PAIR))
    channel = program * OWN_IN + own
    inside = (own < OWN_IN) & (channel < D)
    channel = gl.where(inside, channel, 0)
    cell = channel[:, None] * N + n[None, :]
    row = gl.arange(0, CHANNELS, gl.SliceLayout(1, TILE))
    s = gl.arange(0, SEQ, gl.SliceLayout(0, TILE))
    held = (row < OWN_IN) & (program * OWN_IN + row < D)
    column = gl.where(held, program * OWN_IN + row, 0)
    real = held[:, None] & (s < count)[None, :]
    window_at = gl.load(slots + gl.minimum(s, count - 1)).to(gl.int64)[None, :] * conv_slot + column[:, None]
    tile = (row[:, None] * SEQ + s[None, :]) * 4
    of_tile = products + s[None, :] * (CHANNELS * 4) + row[:, None] * 4

    # this program's columns of the stream: warp s, lane r
    mine = program * OWN_OUT + lane
    has = (lane < OWN_OUT) & (mine < H) & (warp < SEQ)
    mine = gl.where(has, mine, 0)
    flat = sequence * H + mine
    place = (program * 0, program * 0)
    slot_of_warp = gl.load(slots + gl.minimum(warp, count - 1))
    slots_of = ()
    for q in gl.static_range(SEQ):
        slots_of += (gl.load(slots + gl.minimum(q, count - 1)),)
    so_far = gl.load(counters + program)
    stream = gl.load(hidden + gl.minimum(sequence, count - 1) * H + mine, mask=has, other=0.0).to(gl.float32)
    gain = gl.load((anchor + field(table, 0, NORM)).to(BF16) + mine, mask=has, other=0.0).to(gl.float32)
    send(stream, gain, so_far & 0xFFFF, words + (so_far & 1) * STREAM_BYTES, flat, has, P, SEQ, H)

    for layer in range(layers):
        exchange = so_far + layer
        tag, odd = exchange & 0xFFFF, exchange & 1
        x_part = odd * X_BYTES
        h_part = 2 * RANKS * X_BYTES + odd * (2 * RANKS * PARTS_OUT * H_BYTES)
        window = load_window(anchor, table, layer, conv, column, held, window_at, real, conv_row)
        # what the second half of the layer takes besides weights, while memory is idle
        first, own_here = program * OWN_IN, gl.minimum(OWN_IN, D - program * OWN_IN)
        dt_at, rates_at = anchor + field(table, layer, DT), anchor + field(table, layer, A_LOG)
        x_at = anchor + field(table, layer, X)
        prefetch(dt_at + first * (R // 2), own_here * (2 * R), thread)
        prefetch(rates_at + first * N, own_here * (4 * N), thread)
        states = gl.where(warp < count, own_here * (N * STATE_BYTES), 0)
        prefetch(ssm + slot_of_warp.to(gl.int64) * ssm_slot + first * N, states, lane)
        for p in gl.static_range((OUTPUTS + THREADS - 1) // THREADS):
            j = p * THREADS + thread
            prefetch(x_at + (j * (D // 2) + first // 2), gl.where(j < OUTPUTS, 1, 0), 0)

        receive(kept, words + odd * STREAM_BYTES, tag, patient, blamed, SEQ * H + 2 * P * SEQ, H, SEQ)
        find_scales(scales, squares_at, eps, P, SEQ, H)
        x = inputs_of(kept, 2 * H + 64, SEQ, PARTS_IN, CHUNKS)
        columns = ()
        if HOLDS_COLUMNS:
            columns = load_x_columns(x_at, first, OWN_IN, OUTPUTS, D)
        for i in range(TURNS):
            place = multiply_few(place, ring, x, products + i * 32, CHANNELS, PARTS_IN, CHUNKS, SLOTS, SEQ)
        barrier()
        scale = load1(scales + s * 4)[None, :]
        current = total(of_tile, SEQ * CHANNELS * 4) * scale
        u = convolve_tile(current, window, conv + window_at, real, conv_row)
        store1(entered + tile, u)
        store_half(inputs + (s[None, :] * INPUT_STRIDE + row[:, None] * 2), u)
        barrier()

        # x_proj's outputs: each part to the program that adds up that output
        to_all = x_sums + odd.to(gl.int64) * (P * OWN_X * P * SEQ * 8)
        if not HOLDS_COLUMNS:
            columns = load_x_columns(x_at, first, OWN_IN, OUTPUTS, D)
        shares = input_products(columns, inputs, INPUT_STRIDE, OWN_IN, SEQ)
        for t in gl.static_range(ROUNDS_X):
            for half in gl.static_range(2):
                j = (t * WARPS + warp) * 16 + lane // 4 + half * 8
                to = to_all + (((j % P * OWN_X + j // P) * P + program) * SEQ + lane % 4 * 2).to(gl.int64) * 8
                wanted = (j < P * OWN_X) & (lane % 4 * 2 < SEQ)  # zeros past the outputs
                publish_wides(to, shares[t][2 * half], shares[t][2 * half + 1], tag, wanted)
        z_at = products
        for i in range(BEFORE_X):
            place = multiply_few(place, ring, x, z_at + i * 32, CHANNELS, PARTS_IN, CHUNKS, SLOTS, SEQ)
        from_all = to_all + program.to(gl.int64) * (OWN_X * P * SEQ * 8)
        receive_wide(sums, from_all, tag, patient, blamed, OWN_X * P * SEQ)
        for o in gl.static_range(OWN_X):
            output = program + o * P
            whole = over_sources(sums + o * (P * SEQ * 4), sequence, P, SEQ)
            ready = (lane == 0) & (warp < SEQ) & (output < OUTPUTS)
            for r in gl.static_range(RANKS):
                to = peers[r] + (2 * rank * X_BYTES + x_part + (sequence.to(gl.int64) * OUTPUTS + output) * 4)
                publish(to, whole, tag, ready, SCOPE)

        for i in range(BEFORE_X, TURNS):
            place = multiply_few(place, ring, x, z_at + i * 32, CHANNELS, PARTS_IN, CHUNKS, SLOTS, SEQ)
        barrier()
        store1(gates + tile, silu(rounded(total(of_tile, SEQ * CHANNELS * 4) * scale)))
        before = ()
        for q in gl.static_range(SEQ):
            at = ssm + slots_of[q].to(gl.int64) * ssm_slot + cell
            before += (gl.load(at, mask=inside[:, None] & (q < count), other=0.0),)
        rates = gl.load(rates_at.to(FLOAT) + cell, mask=inside[:, None], other=0.0)
        skip = gl.load((anchor + field(table, layer, SKIP)).to(FLOAT) + channel, mask=inside, other=0.0)
        bias = gl.load((anchor + field(table, layer, DT_BIAS)).to(FLOAT) + column, mask=held, other=0.0)
        expand = load_dt_rows(dt_at, program * OWN_IN, OWN_IN, D, R)
        rates = -gl.exp2(rates * LOG2_E) * LOG2_E

        X_ROUNDS: gl.constexpr = (SEQ * OUTPUTS + ROUND - 1) // ROUND
        given = poll(shared + x_part, 2 * X_BYTES, tag, waits, FAILED, SEQ * OUTPUTS, RANKS, SCOPE)
        for k in gl.static_range(X_ROUNDS):
            if RANKS == 1:
                store2(totals + (k * THREADS + thread) * 8, given[2 * k], given[2 * k + 1])
            else:
                a, b, c, d = sums_of_round(given, k, X_ROUNDS, RANKS)
                store2(totals + (k * THREADS + thread) * 8, pack(a, b, False), pack(c, d, False))
        barrier()
        if RMS:
            rms_scales(scales, totals, sequence, rms_eps, R, N)
        step_products(products, expand, totals, R, OUTPUTS, SEQ)
        barrier()
        dot = load1(products + tile) + load1(products + CHANNELS * SEQ * 4 + tile)
        if RMS:
            dot *= load1(scales + 64 + s * 4)[None, :]
        store1(steps + tile, softplus(dot + bias[:, None]))
        barrier()
        for q in gl.static_range(SEQ):
            in_tile = (own * SEQ + q) * 4
            step, now = load1(steps + in_tile), load1(entered + in_tile)
            B = load_half(totals + (q * OUTPUTS + R + n) * 2)
            C = load_half(totals + (q * OUTPUTS + R + N + n) * 2)
            if RMS:
                B *= load1(scales + 128 + n * 0 + q * 4)
                C *= load1(scales + 192 + n * 0 + q * 4)
            entering = (step * now)[:, None] * B[None, :]
            state = gl.exp2(step[:, None] * rates) * before[q].to(gl.float32) + entering
            at = ssm + slots_of[q].to(gl.int64) * ssm_slot + cell
            gl.store(at, state.to(ssm.dtype.element_ty), mask=inside[:, None] & (q < count))
            out = (gl.sum(state * C[None, :], 1) + skip * now) * load1(gates + in_tile)
            to = (channel // WIDE * (SEQ * WIDE) + q * WIDE + channel % WIDE).to(gl.int64)
            publish(y_words + odd * (SEQ * D * 4) + to * 4, out, tag, inside, "gpu")
        conv += conv_layer
        ssm += ssm_layer

        following = gl.load((anchor + field(table, layer + 1, NORM)).to(BF16) + mine, mask=has, other=0.0)
        part, group = program % PARTS_OUT, program // PARTS_OUT
        of_part = y_words + odd * (SEQ * D * 4) + part * (SEQ * WIDE * 4)
        receive(kept, of_part, tag, patient, blamed, SEQ * WIDE, WIDE, SEQ)
        v = inputs_of(kept, 2 * WIDE + 64, SEQ, 1, CHUNKS)
        for i in range((ROWS_OUT + WARPS - 1) // WARPS):
            place = multiply_few(place, ring, v, outs + i * 32, COLUMNS, 1, CHUNKS, SLOTS, SEQ)
        barrier()
        for i in gl.static_range((ROWS_OUT + 31) // 32):
            local = i * 32 + lane
            at = outs + sequence * (COLUMNS * 4) + gl.minimum(local, COLUMNS - 1) * 4
            share = total(at, SEQ * COLUMNS * 4)
            number = group * ROWS_OUT + local
            wanted = (local < ROWS_OUT) & (number < H) & (warp < SEQ)
            at = ((rank * PARTS_OUT + part) * SEQ + sequence).to(gl.int64) * H + number
            for r in gl.static_range(RANKS):
                publish_wide(peers[r] + h_part + at * 8, share, tag, wanted, SCOPE)
        came = poll_sources(
            shared + h_part + flat.to(gl.int64) * 8, 2 * H_BYTES, has, tag, waits, FAILED, RANKS, PARTS_OUT,
            SCOPE,
        )  # fmt: skip
        for r in gl.static_range(RANKS):
            sum = came[r * PARTS_OUT]
            for k in gl.static_range(1, PARTS_OUT):
                sum += came[r * PARTS_OUT + k]
            stream += gl.where(has, sum, 0.0)
        after = exchange + 1
        send(
            stream, following.to(gl.float32), after & 0xFFFF, words + (after & 1) * STREAM_BYTES, flat, has,
            P, SEQ, H,
        )
        barrier()  # all of this is free

    end = so_far + layers
    of_end = words + (end & 1) * STREAM_BYTES + H_BYTES
    receive(squares_at, of_end, end & 0xFFFF, patient, blamed, 2 * P * SEQ, 2 * P * SEQ, SEQ)
    find_scales(scales, squares_at, eps, P, SEQ, H)
    last = gl.load((anchor + field(table, layers, NORM)).to(BF16) + mine, mask=has, other=0.0)
    normed = stream * load1(scales + sequence * 4) * last.to(gl.float32)
    gl.store(y + flat, normed.to(gl.bfloat16), mask=has & (warp < count))
    gl.store(counters + program, end + 1)


@gluon.jit(do_not_specialize=["rank", "layers", "count"])
def few_layers_kernel(
    anchor, table, hidden, slots, counters, y, conv, ssm, words, shared, peers, rank, error, limit, layers,
    count, eps, rms_eps, conv_layer, conv_slot, conv_row, ssm_layer, ssm_slot,
    P: gl.constexpr, H: gl.constexpr, D: gl.constexpr, R: gl.constexpr, N: gl.constexpr, RMS: gl.constexpr,
    RANKS: gl.constexpr, CHUNKS: gl.constexpr, SLOTS: gl.constexpr, BEFORE_X: gl.constexpr,
    AHEAD: gl.constexpr, SEQ: gl.constexpr,
):  # fmt: skip
    """One of P programs, all at once on the GPU: `count` sequences, at most SEQ (4 or 8).

    table, conv, ssm, counters, words, shared, peers: as in `layers_kernel`. hidden: (count, H) bfloat16, the
    residual stream; slots: (count,); y: (count, H) bfloat16, the last norm of the stream.
    """
    PARTS_OUT: gl.constexpr = D // (256 * CHUNKS)
    ROWS_OUT: gl.constexpr = (H + P - 1) // P * PARTS_OUT
    PLACES: gl.constexpr = few_places(P, H, CHUNKS, R + 2 * N, ROWS_OUT, SEQ)
    RING: gl.constexpr = SLOTS * WARPS * row_bytes(CHUNKS)
    ALL: gl.constexpr = RING + PLACES[len(PLACES) - 1] + 16 * SLOTS
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    arena = gl.allocate_shared_memory(gl.int32, [(ALL + 4095) // 4096, 1024], FLAT)
    start = address_of(arena)
    memory = ()
    for k in gl.static_range(len(PLACES) - 1):
        memory += (start + (RING + PLACES[k]),)
    at = start + (RING + PLACES[len(PLACES) - 1])
    ring = (start, at, at + 8 * SLOTS)
    open_barriers(at, 2 * SLOTS)
    waits = (error, limit.to(gl.int64))
    gl.warp_specialize(
        [
            (_work_few, (
                ring, memory, anchor, table, hidden, slots, counters, y, conv, ssm, words, shared, peers,
                rank, waits, layers, count, eps, rms_eps, conv_layer, conv_slot, conv_row, ssm_layer,
                ssm_slot, P, H, D, R, N, RMS, RANKS, CHUNKS, SLOTS, BEFORE_X, SEQ,
            )),
            (fetch_all, (ring, anchor, table, layers, P, H, D, CHUNKS, SLOTS, AHEAD, PARTS_OUT)),
        ],
        [1], [32],
    )  # fmt: skip
    # as in `layers_kernel`
    if limit < 0:
        gl.store(counters + gl.maximum(arena.index(0).load(LINE), 0), 0)
