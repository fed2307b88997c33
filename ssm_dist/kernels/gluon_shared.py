"""Shared memory by address (Gluon, sm_90).

Gluon puts barriers of all warps between whatever it knows to touch the same memory, and its bulk copies want
tensor descriptors. So kernels with a ring of weights have one piece of shared memory, whose address
`address_of` finds, and all that touches it is assembly; barriers are where the kernels say so.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ssm_dist.kernels.gluon_warp import barrier
from ssm_dist.kernels.gluon_words import LINE, THREADS

MARK = gl.constexpr(0x5EED1234)


@gluon.jit
def address_of(arena):
    """Where `arena`, (n, 1024) int32, lies in shared memory: found by what is stored there."""
    thread = gl.arange(0, THREADS, LINE)
    arena.index(0).store(gl.arange(0, 1024, LINE) + MARK)
    barrier()
    start = gl.inline_asm_elementwise(
        "mov.u32 $0, global_smem;", "=r,r", [thread], gl.int32, is_pure=False, pack=1
    )
    found = gl.zeros_like(thread)
    for k in range(227 * 1024 // 16 // THREADS + 1):
        at = start + (k * THREADS + thread) * 16
        first, second = gl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .u32 end; mov.u32 end, %total_smem_size; mov.b32 $0, 0; mov.b32 $1, 0; "
            "add.u32 end, end, -16; setp.le.u32 p, $2, end; @p ld.shared.v2.b32 {$0, $1}, [$2]; }",
            "=&r,=&r,r", [at], (gl.int32, gl.int32), is_pure=False, pack=1,
        )  # fmt: skip
        found = gl.where((first == MARK) & (second == MARK + 1), at, found)
    result = gl.max(found, 0)
    barrier()
    return result


@gluon.jit
def clear(at, BYTES: gl.constexpr):
    """Zeros from the address `at` on: what is not fetched of a padded width must be finite."""
    thread = gl.arange(0, THREADS, LINE)
    zero = gl.zeros([THREADS], gl.float32, LINE)
    for k in range(BYTES // (16 * THREADS)):
        store4(at + (k * THREADS + thread) * 16, zero, zero, zero, zero)


@gluon.jit
def load4(at):
    """Four words from a multiple of 16 in shared memory."""
    return gl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r", [at],
        (gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load2(at):
    """Two float32 numbers from a multiple of 8 in shared memory."""
    return gl.inline_asm_elementwise(
        "ld.shared.v2.f32 {$0, $1}, [$2];", "=f,=f,r", [at], (gl.float32, gl.float32), is_pure=False, pack=1
    )


@gluon.jit
def load1(at):
    """A float32 number from shared memory."""
    return gl.inline_asm_elementwise(
        "ld.shared.f32 $0, [$1];", "=f,r", [at], gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def load_word(at):
    """A word from shared memory."""
    return gl.inline_asm_elementwise(
        "ld.shared.b32 $0, [$1];", "=r,r", [at], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def load_half(at):
    """A bfloat16 number from shared memory, in float32."""
    return gl.inline_asm_elementwise(
        "{ .reg .b16 half, none; .reg .b32 word; mov.b16 none, 0; ld.shared.b16 half, [$1]; "
        "mov.b32 word, {none, half}; mov.b32 $0, word; }",
        "=f,r", [at], gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def store_half(at, value):
    """A float32 number, rounded to bfloat16, into shared memory."""
    gl.inline_asm_elementwise(
        "{ .reg .b16 half; cvt.rn.bf16.f32 half, $2; st.shared.b16 [$1], half; mov.b32 $0, 0; }",
        "=r,r,f", [at, value], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def store1(at, value):
    """A float32 number into shared memory."""
    gl.inline_asm_elementwise(
        "st.shared.f32 [$1], $2; mov.b32 $0, 0;", "=r,r,f", [at, value], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def store2(at, first, second):
    """Two words into shared memory, at a multiple of 8."""
    gl.inline_asm_elementwise(
        "st.shared.v2.b32 [$1], {$2, $3}; mov.b32 $0, 0;", "=r,r,r,r", [at, first, second], gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def store_pair(at, first, second, wanted):
    """Two float32 numbers into shared memory, at a multiple of 8, where wanted."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $4, 0; @p st.shared.v2.f32 [$1], {$2, $3}; mov.b32 $0, 0; }",
        "=r,r,f,f,r", [at, first, second, wanted.to(gl.int32)], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def store4(at, a, b, c, d):
    """Four float32 numbers into shared memory, at a multiple of 16."""
    gl.inline_asm_elementwise(
        "st.shared.v4.f32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;", "=r,r,f,f,f,f", [at, a, b, c, d], gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip
