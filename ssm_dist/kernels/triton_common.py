"""Pieces shared by the Triton kernels: the split of ragged batches into chunks, and activations."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""The interpreter knows no libdevice."""
LOG2_E = tl.constexpr(1.4426950408889634)


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
        result = libdevice.fast_dividef(v, 1.0 + libdevice.exp2(v * -LOG2_E))
    return result


@triton.constexpr_function
def log1p_coefficient(k):
    """Polynomial of log(1 + e) / e on [0, 1], 2.2e-7 off at most and exact at 0; highest of 8 powers first.

    Small steps are the usual ones: an error at e = 0 would add up over a sequence.
    """
    return (
        -0.008778955783013458, 0.04498664359475674, -0.10902291350030421, 0.17847208472298726,
        -0.24536866274641353, 0.33284063834581906, -0.4999818035079142, 1.0,
    )[k]  # fmt: skip


@triton.jit
def softplus(v):
    """log(1 + exp(v)) to 4e-7, also where exp(v) is far below 1, with a single special-function operation.

    It is max(v, 0) + log(1 + e), e = exp(-|v|). On a GPU, e adds the rounding of its argument: 4e-6 at -60.
    """
    e = tl.exp(-tl.abs(v)) if INTERPRETED else libdevice.exp2(tl.abs(v) * -LOG2_E)
    p = tl.zeros_like(e)
    for k in tl.static_range(8):
        p = tl.fma(e, p, log1p_coefficient(k))
    return tl.fma(e, p, tl.maximum(v, 0.0))
