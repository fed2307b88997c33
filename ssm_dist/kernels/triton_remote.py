"""What GPUs that see each other's memory need to talk: stores that others see, and bounded waits for them.

Two protocols. *Words that are their own flags*: a sender stores 16 bytes at once, or single words; a receiver
polls until none of four words is EMPTY, and stores EMPTY again. *Flags*: a sender stores data, then raises a
flag with release; a receiver polls the flag with acquire, then loads the data.

A wait ends after `limit` nanoseconds with a code in the error words, and at once when there is a code
already, so that a graph full of waits ends soon after the first one that failed. What it returns then is of
no use. The words are in the device's own memory, and lead to one in the host's: thousands of threads that
look into the host's memory while they wait take milliseconds for it, and the other rank then waits as long
in the next call.

Triton's interpreter takes no inline assembly: there, ranks are played one phase after the other, and nobody
waits.

Two things to know of inline assembly in Triton. It runs once for each element that a thread holds, and a tile
smaller than the threads of its program is held several times over, as is any tile that the compiler finds
better so: tiles have at least 32 * num_warps elements, and single words are stored by one thread. A copy that
comes late would stay in a slot from which the word was taken. And the compiler may compute a value again in
another layout, even one from assembly with effects, but never the results of a loop: hence the loop of one
round in `take_sum`.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.kernels.triton_common import INTERPRETED

EMPTY = tl.constexpr(-1)
"""The word that stands for nothing yet: as two bfloat16 or float16, or as a float32, it is NaN."""

NAN_WORD = tl.constexpr(0x7FFF7FFF)
"""What a sender stores in the place of EMPTY: NaN as well."""


def pushing(words: str, condition: str, scope: str = "sys") -> str:
    """Assembly that stores words at the address $1, all at once, where `condition` finds them wanted.

    words: one, two or four operands; condition: lines that set the predicate `wanted`; scope: "gpu" or "sys",
    where they are seen. $0 becomes 0: assembly has a result.
    """
    count = words.count("$")
    vector, what = (f".v{count}", f"{{{words}}}") if count > 1 else ("", words)
    return (
        f"{{ .reg .pred wanted; {condition} @wanted st.relaxed.{scope}.global{vector}.b32 [$1], {what}; "
        "mov.b32 $0, 0; }"
    )


THREAD = ".reg .u32 thread; mov.u32 thread, %tid.x;"
PUSH = tl.constexpr(pushing("$2, $3, $4, $5", "setp.ne.s32 wanted, $6, 0;"))
PUSH_WORD = tl.constexpr(pushing("$2", "setp.ne.s32 wanted, $3, 0;"))
PUSH_BY_THREAD = tl.constexpr(pushing("$2", f"{THREAD} setp.eq.u32 wanted, thread, $3;"))

# after every 1024 polls (a fraction of a millisecond), look at the error word and at the time
PATIENCE = """
    add.s32     polls, polls, 1;
    and.b32     word, polls, 1023;
    setp.ne.s32 again, word, 0;
    @again bra  poll;
    ld.relaxed.gpu.global.b32 word, [{error}];
    setp.ne.s32 again, word, 0;
    @again bra  over;
    mov.u64     now, %globaltimer;
    setp.eq.s64 again, begun, 0;
    @again mov.b64 begun, now;
    sub.s64     now, now, begun;
    setp.lt.s64 again, now, {limit};
    @again bra  poll;
"""

# leave the code of a wait that failed in the error words
FAIL = """
    st.relaxed.sys.global.b32 [{error}], {code};
    ld.global.b64 begun, [{error}+8];
    st.relaxed.sys.global.b32 [begun], {code};
"""

WAIT = tl.constexpr(
    """
{
    .reg .pred  again;
    .reg .b32   polls, word;
    .reg .b64   begun, now;
    mov.b32     polls, 0;
    mov.b64     begun, 0;
poll:
    ld.acquire.sys.global.b32 $0, [$1];
    sub.s32     word, $0, $2;
    setp.ge.s32 again, word, 0;
    @again bra  over;"""
    + PATIENCE.format(error="$3", limit="$4")
    + FAIL.format(error="$3", code="$5")
    + """
over:
}
"""
)


def error_words(host: Tensor, device: torch.device) -> Tensor:
    """(4,) int32 on the device: a code, 0 so far, and from the third on the address of `host`.

    host: (1,) int32 in pinned memory; it gets the code, too, for who would not wait for the device.
    """
    return torch.tensor([0, host.data_ptr()], dtype=torch.int64).to(device).view(torch.int32)


@functools.cache
def taking(sources: int, dtype: torch.dtype) -> str:
    """Assembly that takes 16 bytes from each of `sources` places and adds up their numbers, for `take_sum`.

    $0 to $7: the sums, float32 (two a word; of float32, the first of each two); $8: address of the first
    place; $9: whether anything is wanted (else 0); $10: distance of the places; $11: address of the error
    words; $12: limit; $13: code, to which the number of the first place that is empty is added.
    """
    places = range(sources)
    words = [[f"w{4 * place + i}" for i in range(4)] for place in places]
    zero = [f"mov.b32 ${i}, 0;" for i in range(8)]
    addresses = ["mov.b64 from0, $8;", *(f"add.s64 from{i}, from{i - 1}, $10;" for i in places[1:])]
    load = [f"ld.relaxed.sys.global.v4.b32 {{{', '.join(words[i])}}}, [from{i}];" for i in places]
    empty = ["setp.eq.s32 again, w0, -1;"]
    empty += [f"setp.eq.or.s32 again, w{i}, -1, again;" for i in range(1, 4 * sources)]
    blame = [
        line
        for i in reversed(places)
        for word in words[i]
        for line in (f"setp.eq.s32 again, {word}, -1;", f"@again add.s32 word, $13, {i};")
    ]
    leave = [f"st.relaxed.sys.global.v4.b32 [from{i}], {{-1, -1, -1, -1}};" for i in places]
    add = [
        line for i in places for w, word in enumerate(words[i]) for line in _adding(word, w, i == 0, dtype)
    ]
    return "\n".join(
        [
            "{",
            ".reg .pred again; .reg .b16 h0, h1; .reg .b32 polls, word, low, high;",
            f".reg .b32 w<{4 * sources}>; .reg .b64 begun, now, from<{sources}>;",
            *zero, "setp.eq.s32 again, $9, 0;", "@again bra nothing;",
            "mov.b32 polls, 0;", "mov.b64 begun, 0;", *addresses,
            "poll:", *load, *empty, "@!again bra over;", PATIENCE.format(error="$11", limit="$12"),
            *blame, FAIL.format(error="$11", code="word"),
            "over:", *leave, *add,
            "nothing:", "}",
        ]
    )  # fmt: skip


def _adding(word: str, index: int, first: bool, dtype: torch.dtype) -> list[str]:
    """Assembly that adds the numbers of a word to the sums 2 * index and 2 * index + 1."""
    low, high = f"${2 * index}", f"${2 * index + 1}"
    if dtype == torch.float32:
        return [f"mov.b32 {low}, {word};" if first else f"add.rn.f32 {low}, {low}, {word};"]
    widen = {
        torch.bfloat16: [f"shl.b32 low, {word}, 16;", f"and.b32 high, {word}, 0xffff0000;"],
        torch.float16: [f"mov.b32 {{h0, h1}}, {word};", "cvt.f32.f16 low, h0;", "cvt.f32.f16 high, h1;"],
    }[dtype]
    if first:
        return [*widen, f"mov.b32 {low}, low;", f"mov.b32 {high}, high;"]
    return [*widen, f"add.rn.f32 {low}, {low}, low;", f"add.rn.f32 {high}, {high}, high;"]


@triton.jit
def push(at, a, b, c, d, wanted):
    """Store the words a, b, c, d at the addresses `at` (int64, multiples of 16) where `wanted`."""
    if INTERPRETED:
        words = at.to(tl.pointer_type(tl.int32))
        tl.store(words, a, mask=wanted)
        tl.store(words + 1, b, mask=wanted)
        tl.store(words + 2, c, mask=wanted)
        tl.store(words + 3, d, mask=wanted)
    else:
        tl.inline_asm_elementwise(
            PUSH, "=r,l,r,r,r,r,r", [at, a, b, c, d, wanted.to(tl.int32)], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def push_one(at, word, thread):
    """Store one word (int32) at the address `at` (int64, a multiple of 4), by that thread of the program."""
    if INTERPRETED:
        tl.store(at.to(tl.pointer_type(tl.int32)), word)
    else:
        tl.inline_asm_elementwise(
            PUSH_BY_THREAD, "=r,l,r,r", [at, word, thread], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def push_words(at, word, wanted):
    """Store each word (int32) at the address `at` (int64, a multiple of 4) where `wanted`.

    Whether threads hold copies of words, which would be stored, too, is the compiler's choice: the tests look
    at what it has made of each use.
    """
    if INTERPRETED:
        tl.store(at.to(tl.pointer_type(tl.int32)), word, mask=wanted)
    else:
        tl.inline_asm_elementwise(
            PUSH_WORD, "=r,l,r,r", [at, word, wanted.to(tl.int32)], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def halves(word, DTYPE: tl.constexpr):
    """The two numbers of a word, low and high, in float32; of DTYPE float32, the number and 0."""
    if DTYPE == tl.float32:  # noqa: SIM300
        low, high = word.to(tl.float32, bitcast=True), tl.zeros(word.shape, tl.float32)
    else:
        low = (word & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def word_of(low, high, DTYPE: tl.constexpr):
    """The inverse of `halves`, rounding to DTYPE; never EMPTY."""
    if DTYPE == tl.float32:  # noqa: SIM300
        word = low.to(tl.int32, bitcast=True)
    else:
        word = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        word |= high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16
    return tl.where(word == EMPTY, NAN_WORD, word)


@triton.jit
def take_sum(
    at, wanted, distance, error, limit, code,
    TAKING: tl.constexpr, SOURCES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """What has come to the addresses at + i * distance, i < SOURCES, added up in order; EMPTY is left there.

    at (BLOCK,) int64; wanted (BLOCK,), 0 is returned elsewhere; error: address of the error words; TAKING:
    `taking(SOURCES, DTYPE)`. Returns the two halves of each of the four words, eight times (BLOCK,) float32.
    """
    zero = tl.zeros(at.shape, tl.float32)
    a0, a1, b0, b1, c0, c1, d0, d1 = zero, zero, zero, zero, zero, zero, zero, zero
    if INTERPRETED:
        for source in tl.static_range(SOURCES):
            words = (at + source * distance).to(tl.pointer_type(tl.int32))
            e0, e1 = halves(tl.load(words, mask=wanted, other=0), DTYPE)
            f0, f1 = halves(tl.load(words + 1, mask=wanted, other=0), DTYPE)
            g0, g1 = halves(tl.load(words + 2, mask=wanted, other=0), DTYPE)
            h0, h1 = halves(tl.load(words + 3, mask=wanted, other=0), DTYPE)
            a0, a1, b0, b1 = a0 + e0, a1 + e1, b0 + f0, b1 + f1
            c0, c1, d0, d1 = c0 + g0, c1 + g1, d0 + h0, d1 + h1
            for word in tl.static_range(4):
                tl.store(words + word, EMPTY, mask=wanted)
    else:
        limit = tl.cast(limit, tl.int64)  # less than 2.1 s would come as 32 bits
        left = limit
        while left > 0:
            a0, a1, b0, b1, c0, c1, d0, d1 = tl.inline_asm_elementwise(
                TAKING, "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,l,r,l,l,l,r",
                [at, wanted.to(tl.int32), distance, error, limit, code],
                (
                    tl.float32, tl.float32, tl.float32, tl.float32,
                    tl.float32, tl.float32, tl.float32, tl.float32,
                ),
                is_pure=False, pack=1,
            )  # fmt: skip
            left -= limit
    return a0, a1, b0, b1, c0, c1, d0, d1


@triton.jit
def raise_flag(flag, value):
    """Store `value` in the flag (an address, int64), after what was stored before the last barrier."""
    tl.atomic_xchg(flag.to(tl.pointer_type(tl.int32)), value, sem="release", scope="sys")


@triton.jit
def wait_for_flag(flag, value, error, limit, code):
    """Return when the flag (an address, int64) has reached `value`; a thread sees what came before it."""
    if not INTERPRETED:
        limit = tl.cast(limit, tl.int64)
        tl.inline_asm_elementwise(
            WAIT, "=&r,l,r,l,l,r", [flag, value, error, limit, code], tl.int32, is_pure=False, pack=1
        )
