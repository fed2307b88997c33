"""Pieces shared by the Triton kernels: the split of ragged batches into chunks, and activations."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""The interpreter knows no libdevice."""


@triton.jit
def chunk_of_program(seq_offsets, sequences, program, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Which chunk of which sequence a program works on: (sequence, its start and end, first token).

    Sequence s owns the programs from seq_offsets[s] // CHUNK + s on, which leaves room for every chunk of
    every sequence (a chunk never crosses two) with a grid of T // CHUNK + S, known without reading the
    offsets. Programs that get nothing see a first token at or past the end.
    """
    sequence, start, end = -1, 0, 0
    for base in range(0, sequences, BLOCK):
        s = base + tl.arange(0, BLOCK)
        starts = tl.load(seq_offsets + s, mask=s < sequences, other=0)
        ends = tl.load(seq_offsets + s + 1, mask=s < sequences, other=0)
        before = (s < sequences) & (starts // CHUNK + s <= program)
        sequence += tl.sum(before.to(tl.int32), 0)
        start = tl.maximum(start, tl.max(tl.where(before, starts, 0), 0))
        end = tl.maximum(end, tl.max(tl.where(before, ends, 0), 0))
    return sequence, start, end, start + (program - start // CHUNK - sequence) * CHUNK


@triton.jit
def sequence_of(seq_offsets, sequences, token, BLOCK: tl.constexpr):
    """The sequence that owns a packed token: as many as end before it come first."""
    sequence = 0
    for base in range(0, sequences, BLOCK):
        s = base + tl.arange(0, BLOCK)
        ends = tl.load(seq_offsets + s + 1, mask=s < sequences, other=2147483647)
        sequence += tl.sum((ends <= token).to(tl.int32), 0)
    return sequence


@triton.jit
def only_if(condition, limit):
    """`limit`, or 0 where a scalar condition fails: `index < only_if(c, n)` is `(index < n) & c`.

    The interpreter's mixed & of a block and a scalar makes no mask that tl.load takes.
    """
    return tl.where(condition, limit, 0)


@triton.jit
def factor(v):
    """An operand of tl.dot, which the interpreter cannot multiply in bfloat16."""
    return v.to(tl.float32) if INTERPRETED else v


@triton.jit
def exp2(v):
    """2 ** v in one instruction; results below 1e-38 become 0."""
    return tl.exp2(v) if INTERPRETED else libdevice.exp2(v)


@triton.jit
def silu(v):
    """v * sigmoid(v) in float32; 5 instructions instead of 12, which even memory-bound kernels feel."""
    if INTERPRETED:
        result = v / (1.0 + tl.exp(-v))
    else:
        result = libdevice.fast_dividef(v, 1.0 + libdevice.fast_expf(-v))
    return result


@triton.jit
def softplus(v):
    """log(1 + exp(v)) to float32 rounding, also where exp(v) is far below 1.

    max(v, 0) + log1p(e), e = exp(-|v|), by the series log1p(e) = 2 artanh(e / (2 + e)); the argument is at
    most 1/3, so that eight terms leave an error below 1e-9.
    """
    e = tl.exp(-tl.abs(v))
    r = e / (2.0 + e)
    q = r * r
    series = 1.0 / 15.0
    series = series * q + 1.0 / 13.0
    series = series * q + 1.0 / 11.0
    series = series * q + 1.0 / 9.0
    series = series * q + 1.0 / 7.0
    series = series * q + 1.0 / 5.0
    series = series * q + 1.0 / 3.0
    return tl.maximum(v, 0.0) + 2.0 * r * (series * q + 1.0)
