"""Vectors that programs of one kernel, on one GPU or several, hand to each other (Gluon, sm_90).

A word is a bfloat16 number and, in its low half, a tag: the number of the exchange. Who needs a vector polls
its words until all have the tag; so a number arrives with the news of its arrival, and no barrier, flag or
fence stands between. Words are never emptied: the next vector in the same place has another tag. Whoever
writes that one must know that everybody has read this one.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ssm_dist.kernels.gluon_warp import unpack
from ssm_dist.kernels.triton_remote import FAIL, PATIENCE

THREADS = gl.constexpr(256)
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))
"""(THREADS,): one a thread."""
GIVE_UP = gl.constexpr(PATIENCE.format(error="errors", limit="most"))
LEAVE_CODE = gl.constexpr(FAIL.format(error="errors", code="blame"))


@gluon.constexpr_function
def _polling(rounds, ranks, scope):
    """Assembly for `poll`.

    $0 on: the results; then the address of the thread's first four words, the distance of the ranks', whether
    the last round has words for this thread, the tag, the address of the error words, the limit and the code.
    """
    loads = [(r, k, 4 * (r * rounds + k)) for r in range(ranks) for k in range(rounds)]
    count = 4 * len(loads)
    base, distance, whole, tag, error, limit, code = (f"${count // 2 + i}" for i in range(7))
    lines = [
        "{", ".reg .pred again, all; .reg .b32 polls, word, blame;",
        f".reg .b32 w<{count}>; .reg .b64 begun, now, errors, most, from<{ranks}>;",
        f"mov.b64 errors, {error};", f"mov.b64 most, {limit};", f"mov.b32 blame, {code};",
        "mov.b32 polls, 0;", "mov.b64 begun, 0;", f"setp.ne.s32 all, {whole}, 0;",
        f"mov.b64 from0, {base};", *(f"add.s64 from{r}, from{r - 1}, {distance};" for r in range(1, ranks)),
        *(f"mov.b32 w{i}, {tag};" for i in range(count)),
        "poll:",
    ]  # fmt: skip
    for r, k, i in loads:
        guard = "@all " if k == rounds - 1 else ""
        four = ", ".join(f"w{i + j}" for j in range(4))
        lines.append(
            f"{guard}ld.relaxed.{scope}.global.v4.b32 {{{four}}}, [from{r}+{16 * THREADS.value * k}];"
        )
    lines += [f"xor.b32 word, w0, {tag};"]
    lines += [f"lop3.b32 word, w{i}, {tag}, word, 0xBE;" for i in range(1, count)]  # word | (w ^ tag)
    lines += ["and.b32 word, word, 0xffff;", "setp.eq.s32 again, word, 0;", "@again bra over;", GIVE_UP.value]
    for r, _, i in reversed(loads):
        lines += [f"xor.b32 word, w{i}, {tag};"]
        lines += [f"lop3.b32 word, w{i + j}, {tag}, word, 0xBE;" for j in range(1, 4)]
        lines += ["and.b32 word, word, 0xffff;", "setp.ne.s32 again, word, 0;",
                  f"@again add.s32 blame, {code}, {r};"]  # fmt: skip
    lines += [LEAVE_CODE.value, "over:"]
    lines += [f"prmt.b32 ${j}, w{2 * j}, w{2 * j + 1}, 0x7632;" for j in range(count // 2)]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _constraints(results):
    return ",".join(["=&r"] * results + ["l", "l", "r", "r", "l", "l", "r"])


@gluon.constexpr_function
def _words(count):
    return tuple([gl.int32] * count)


@gluon.constexpr_function
def _publishing(scope):
    return (
        "{ .reg .pred wanted; setp.ne.s32 wanted, $3, 0; "
        f"@wanted st.relaxed.{scope}.global.b32 [$1], $2; mov.b32 $0, 0; }}"
    )


@gluon.jit
def poll(
    address, distance, tag, waits, code, WIDTH: gl.constexpr, RANKS: gl.constexpr, SCOPE: gl.constexpr
):
    """What has come for a vector of WIDTH from RANKS ranks, four words a thread each round.

    address: of the first rank's words; distance: bytes to the next rank's; waits: address of the error words,
    limit in nanoseconds; code: to which the first rank that has sent nothing is added. Returns two packed
    words of two numbers for each rank and round, in this order: numbers 4 t to 4 t + 3 of thread t.
    """
    ROUNDS: gl.constexpr = (WIDTH + 4 * THREADS - 1) // (4 * THREADS)
    COUNT: gl.constexpr = 2 * ROUNDS * RANKS
    thread = gl.arange(0, THREADS, LINE)
    whole = ((ROUNDS - 1) * 4 * THREADS + thread * 4 < WIDTH).to(gl.int32)
    distance = gl.to_tensor(distance).to(gl.int64)  # the assembly takes 64 bits
    return gl.inline_asm_elementwise(
        _polling(ROUNDS, RANKS, SCOPE), _constraints(COUNT),
        [address + thread.to(gl.int64) * 16, distance, whole, tag, waits[0], waits[1], code], _words(COUNT),
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def publish(address, value, tag, wanted, SCOPE: gl.constexpr):
    """Store numbers, rounded, as words at their addresses (int64) where wanted.

    Copies of a number that several threads hold may all be stored: they are the same, and come before
    whatever their program does after its next barrier.
    """
    word = (value.to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32) << 16) | tag
    gl.inline_asm_elementwise(
        _publishing(SCOPE), "=r,l,r,r", [address, word, wanted.to(gl.int32)], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def low(word):
    """The first of two packed numbers, in float32."""
    return unpack(word, False)[0]


@gluon.jit
def high(word):
    """The second of two packed numbers, in float32."""
    return unpack(word, False)[1]


@gluon.jit
def rounded(value):
    """A float32 number as bfloat16 has it."""
    return value.to(gl.bfloat16).to(gl.float32)
