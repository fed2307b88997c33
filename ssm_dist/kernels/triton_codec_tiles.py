"""The codecs in Triton, on tiles of ROWS rows x CHUNK columns, with the bits of their definitions on a GPU.

What that takes: torch divides by a number on a CPU, and multiplies by its reciprocal on a GPU; no fused
multiply-add between a product and the sum or rounding after it (`enable_fp_fusion=False`); true divisions.
The kernels of the codecs and the kernel of long messages are made of these functions.
"""

import torch
import triton
import triton.language as tl

from ssm_dist.kernels.triton_common import INTERPRETED

CODES = {"none": 0, "int8": 1, "fp8": 2, "int4": 3}
"""The codecs as kernels know them."""

NONE, INT8, FP8, INT4 = (tl.constexpr(code) for code in CODES.values())

ROWS, CHUNK = 4, 256
"""Of a tile: a row a warp."""

RUN = tl.constexpr(8)
"""Neighbours that a thread holds, whatever the type. Loads and stores are of runs, and scales are repeated
for each run of their group, so that nothing goes from thread to thread between a load, the arithmetic and a
store: that would take barriers. A group is several whole runs, and a chunk several whole groups."""

SMALLEST_SCALE = tl.constexpr(torch.finfo(torch.float32).tiny)
FIRST_INFINITE = tl.constexpr(0x7F800000)
"""Magnitudes of float32 are ordered as their bits; those from here on are infinity and NaN."""

ROUNDER = tl.constexpr(1.5 * 2**23)
"""Added and taken away again, it rounds numbers below 2 ** 22 to the nearest integer, ties to even. In
between, the lowest bits are those of the integer, without a conversion."""


@triton.jit
def over(v, NUMBER: tl.constexpr):
    """v / NUMBER as torch computes it on the device."""
    return v / NUMBER if INTERPRETED else v * (1.0 / NUMBER)


@triton.jit
def e4m3_code(v):
    """v, of at most 448, rounded to the nearest e4m3, as its eight bits in an int32.

    By arithmetic: between a conversion by the hardware and a use of its bytes after a branch, ptxas 12 mixes
    up registers, and Triton's interpreter loses carries.
    """
    bits, size = v.to(tl.int32, bitcast=True), tl.abs(v)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0x7FF00000
    below = ((size + ROUNDER / 512) - ROUNDER / 512).to(tl.int32, bitcast=True)
    nearest = tl.where(size < 0.015625, below, normal).to(tl.float32, bitcast=True)
    return ((nearest * 2.0**-120).to(tl.int32, bitcast=True) >> 20) | ((bits >> 24) & 0x80)


@triton.jit
def of_e4m3_code(code):
    """The inverse of `e4m3_code`, float32; of NaN's code, 480."""
    code = code.to(tl.int32)
    return (((code & 0x80) << 24) | ((code & 0x7F) << 20)).to(tl.float32, bitcast=True) * 2.0**120


@triton.jit
def _runs(x):
    """x (ROWS, N) -> (ROWS, N / RUN, RUN)."""
    return tl.reshape(x, (x.shape[0], x.shape[1] // RUN, RUN))


@triton.jit
def _of_groups(of_runs, GROUP: tl.constexpr):
    """The largest of the runs of each group, for each of its runs: (ROWS, N / RUN)."""
    groups = tl.reshape(of_runs, (of_runs.shape[0], of_runs.shape[1] * RUN // GROUP, GROUP // RUN))
    groups = tl.broadcast_to(tl.max(groups, 2, keep_dims=True), groups.shape)
    return tl.reshape(groups, of_runs.shape)


@triton.jit
def quantised(x, CODEC: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr):
    """x (ROWS, CHUNK) float32 -> payload of that shape and scales (ROWS, CHUNK / RUN).

    As `codec_primitives.quantize`, the scale of a group repeated for each of its runs. The payload: codes of
    fp8 as int32, integers + ROUNDER as float32; with codec none, x in DTYPE, and nothing to use as scales.
    """
    if CODEC == NONE:
        payload, scale = x.to(DTYPE), x
    else:
        runs = _runs(x)
        largest = _of_groups(tl.max(runs.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2), GROUP)
        finite = largest < FIRST_INFINITE
        amax = tl.where(finite, largest, 0).to(tl.float32, bitcast=True)
        runs = tl.where(finite[:, :, None], runs, 0.0)
        if CODEC == FP8:
            step = over(tl.maximum(amax, 448.0 * SMALLEST_SCALE), 448.0)
            scaled = tl.div_rn(runs, tl.broadcast_to(step[:, :, None], runs.shape))
            limited = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
            coded = e4m3_code(limited)
        else:
            if CODEC == INT8:
                step = tl.maximum(over(amax, 127.0), SMALLEST_SCALE)
            else:
                below = _of_groups(tl.max(-runs, 2), GROUP) == amax
                step = tl.where(below, amax, -amax) * 0.125
                step = tl.where(amax * 0.125 < SMALLEST_SCALE, SMALLEST_SCALE, step)
            scaled = runs * tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step)[:, :, None]
            coded = scaled + ROUNDER  # at most 127.0001 or 8.0001 from it: only the 8 is out of range
            if CODEC == INT4:
                coded = tl.minimum(coded, ROUNDER + 7.0)
        payload, scale = tl.reshape(coded, x.shape), tl.where(finite, step, float("nan"))
    return payload, scale


@triton.jit
def decoded(payload, scale, CODEC: tl.constexpr):
    """What a payload (ROWS, CHUNK), made here or loaded, and its scales stand for: (ROWS, CHUNK) float32."""
    if CODEC == FP8:
        x = of_e4m3_code(payload)
    elif CODEC != NONE and payload.dtype == tl.float32:
        x = payload - ROUNDER
    else:
        x = payload.to(tl.float32)
    if CODEC != NONE:
        x = tl.reshape(_runs(x) * scale[:, :, None], x.shape)
    return x


@triton.jit
def _columns(first, N: tl.constexpr, OF: tl.constexpr):
    """(N,) from first on, in runs of OF."""
    return tl.max_contiguous(first + tl.arange(0, N), OF)


@triton.jit
def _flat(x):
    """x (ROWS, N) -> (ROWS * N,): of a tile of single words, Triton 3.6 would give a thread other columns."""
    return tl.reshape(x, (x.shape[0] * x.shape[1],))


@triton.jit
def _scales_at(at, rows, first, width, scales_at, CHUNK: tl.constexpr, GROUP: tl.constexpr):
    """Pointers to the scales of the runs, which runs there are, and which begin a group; all of them flat."""
    column = first + tl.arange(0, CHUNK // RUN) * RUN
    inside = rows[:, None] & (column < width)[None, :]
    scales = (at + scales_at).to(tl.pointer_type(tl.float32))[:, None] + (column // GROUP)[None, :]
    return _flat(scales), _flat(inside), _flat(inside & (column % GROUP == 0)[None, :])


@triton.jit
def store_payload(at, rows, payload, first, width, halves, CODEC: tl.constexpr):
    """Store what `quantised` made of the columns from `first` on into the rows that begin at `at` (ROWS,).

    rows (ROWS,): which rows exist; width: of a row; halves: (width + 1) // 2. With codec none, payload holds
    the numbers as they are.
    """
    CHUNK: tl.constexpr = payload.shape[1]
    column = _columns(first, CHUNK, RUN)
    inside = rows[:, None] & (column < width)[None, :]
    if payload.dtype == tl.float32 and CODEC != NONE:
        payload = payload.to(tl.int32, bitcast=True)
    if CODEC == NONE:
        typed = at.to(tl.pointer_type(payload.dtype))
        tl.store(typed[:, None] + column[None, :], payload, mask=inside)
    elif CODEC == INT4:
        low, high = tl.split(tl.reshape(payload, (payload.shape[0], CHUNK // 2, 2)))
        pair = _columns(first // 2, CHUNK // 2, RUN // 2)
        both = ((low & 15) | (high << 4)).to(tl.uint8)
        tl.store(at[:, None] + pair[None, :], both, mask=rows[:, None] & (pair < halves)[None, :])
    else:
        tl.store(at[:, None] + column[None, :], payload.to(tl.uint8), mask=inside)


@triton.jit
def store_quantised(
    at, rows, payload, scale, first, width, halves, scales_at, CODEC: tl.constexpr, GROUP: tl.constexpr
):
    """`store_payload`, and the scales of the same columns; scales_at: their offset in a row."""
    store_payload(at, rows, payload, first, width, halves, CODEC)
    if CODEC != NONE:
        scales, _, begins = _scales_at(at, rows, first, width, scales_at, payload.shape[1], GROUP)
        tl.store(scales, _flat(scale), mask=begins)


@triton.jit
def kept_scales(kept, scale, first, CODEC: tl.constexpr, GROUP: tl.constexpr):
    """`kept` (ROWS, CHUNK / RUN) and the scales of the chunk at `first`, for `store_with_kept`.

    A group has as many runs as chunks are kept: of each chunk, one run of every group.
    """
    if CODEC != NONE:
        RUNS: tl.constexpr = GROUP // RUN
        place = tl.arange(0, kept.shape[1]) % RUNS
        kept = tl.where((place == first // (kept.shape[1] * RUN) % RUNS)[None, :], scale, kept)
    return kept


@triton.jit
def store_with_kept(
    at, rows, payload, kept, first, width, halves, scales_at, CODEC: tl.constexpr, GROUP: tl.constexpr
):
    """`store_quantised`, but scales only with the last chunk of a row, or of those that can be kept.

    Over a link between GPUs, the few scales of a chunk take almost as long as all that are kept.
    """
    store_payload(at, rows, payload, first, width, halves, CODEC)
    if CODEC != NONE:
        CHUNK: tl.constexpr = payload.shape[1]
        RUNS: tl.constexpr = GROUP // RUN
        begin = first // (RUNS * CHUNK) * (RUNS * CHUNK)
        if (first + CHUNK >= width) | (first + CHUNK == begin + RUNS * CHUNK):
            run = tl.arange(0, CHUNK // RUN)
            chunk = begin + run % RUNS * CHUNK
            column = chunk + run // RUNS * GROUP
            inside = rows[:, None] & ((chunk <= first) & (column < width))[None, :]
            scales = (at + scales_at).to(tl.pointer_type(tl.float32))[:, None] + (column // GROUP)[None, :]
            tl.store(_flat(scales), _flat(kept), mask=_flat(inside))


@triton.jit
def load_quantised(
    at, rows, first, width, halves, scales_at,
    CHUNK: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """What `store_quantised` stored: integers (ROWS, CHUNK), scales (ROWS, CHUNK / RUN), 0 outside."""
    column = _columns(first, CHUNK, RUN)
    inside = rows[:, None] & (column < width)[None, :]
    if CODEC == NONE:
        typed = at.to(tl.pointer_type(DTYPE))
        payload = tl.load(typed[:, None] + column[None, :], mask=inside, other=0.0)
        scale = payload
    else:
        scales, has_scale, _ = _scales_at(at, rows, first, width, scales_at, CHUNK, GROUP)
        scale = tl.reshape(tl.load(scales, mask=has_scale, other=0.0), (at.shape[0], CHUNK // RUN))
        if CODEC == INT4:
            pair = _columns(first // 2, CHUNK // 2, RUN // 2)
            within = rows[:, None] & (pair < halves)[None, :]
            both = tl.load(at[:, None] + pair[None, :], mask=within, other=0).to(tl.int32)
            payload = tl.reshape(tl.join((both << 28) >> 28, (both << 24) >> 28), (at.shape[0], CHUNK))
        else:
            payload = tl.load(at[:, None] + column[None, :], mask=inside, other=0)
            if CODEC == INT8:
                payload = payload.to(tl.int8, bitcast=True)
    return payload, scale


@triton.jit
def load_decoded(
    at, rows, first, width, halves, scales_at,
    CHUNK: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """What `store_quantised` stored, decoded: (ROWS, CHUNK) float32, 0 outside."""
    payload, scale = load_quantised(at, rows, first, width, halves, scales_at, CHUNK, CODEC, GROUP, DTYPE)
    return decoded(payload, scale, CODEC)
