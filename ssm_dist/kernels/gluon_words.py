"""Vectors that programs of one kernel, on one GPU or several, hand to each other (Gluon, sm_90).

A word is a bfloat16 number and, in its low half, a tag: the number of the exchange. Who needs a vector polls
its words until all have the tag; so a number arrives with the news of its arrival, and no barrier, flag or
fence stands between. Words are never emptied: the next vector in the same place has another tag. Whoever
writes that one must know that everybody has read this one. A wide word is a float32 number and its tag, in
eight bytes, for sums of which somebody adds up the parts.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ssm_dist.kernels import triton_remote
from ssm_dist.kernels.gluon_warp import unpack
from ssm_dist.kernels.triton_remote import FAIL, PATIENCE

THREADS = gl.constexpr(256)
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))
"""(THREADS,): one a thread."""
GIVE_UP = gl.constexpr(PATIENCE.format(error="errors", limit="most"))
LEAVE_CODE = gl.constexpr(FAIL.format(error="errors", code="blame"))
pushing = gluon.constexpr_function(triton_remote.pushing)


@gluon.constexpr_function
def _differing(words, tag):
    """Assembly: `word` has the bits in which words differ from the tag; at least one word."""
    lines = [f"xor.b32 word, {words[0]}, {tag};"]
    return lines + [f"lop3.b32 word, {w}, {tag}, word, 0xBE;" for w in words[1:]]  # word | (w ^ tag)


@gluon.constexpr_function
def _until_tagged(operands, registers, setup, loads, words, sources, bits, results):
    """Assembly that repeats `loads` until all words have the tag in some bits, or gives up.

    operands: of the tag, the address of the error words, the limit in nanoseconds and the code. setup: lines
    before the loop, which may go to `over` for threads that do not poll; results: lines after it. sources: a
    number and words, by source, where the code names the first that has sent nothing.
    """
    tag, error, limit, code = operands
    lines = [
        "{", ".reg .pred again; .reg .b32 polls, word, blame;", ".reg .b64 begun, now, errors, most;",
        *registers, f"mov.b64 errors, {error};", f"mov.b64 most, {limit};", f"mov.b32 blame, {code};",
        "mov.b32 polls, 0;", "mov.b64 begun, 0;", *setup, "poll:", *loads, *_differing(words, tag),
        f"and.b32 word, word, {bits};", "setp.eq.s32 again, word, 0;", "@again bra over;", GIVE_UP.value,
    ]  # fmt: skip
    for source, of_source in reversed(sources):
        lines += [*_differing(of_source, tag), f"and.b32 word, word, {bits};",
                  "setp.ne.s32 again, word, 0;", f"@again add.s32 blame, {code}, {source};"]  # fmt: skip
    return "\n".join([*lines, LEAVE_CODE.value, "over:", *results, "}"])


@gluon.constexpr_function
def _polling(rounds, ranks, scope):
    """Assembly for `poll`.

    $0 on: the results; then the address of the thread's first four words, the distance of the ranks', whether
    the last round has words for this thread, the tag, the address of the error words, the limit and the code.
    """
    places = [(r, k, 4 * (r * rounds + k)) for r in range(ranks) for k in range(rounds)]
    count = 4 * len(places)
    base, distance, whole, *operands = (f"${count // 2 + i}" for i in range(7))
    loads = []
    for r, k, i in places:
        guard = "@all " if k == rounds - 1 else ""
        four = ", ".join(f"w{i + j}" for j in range(4))
        loads.append(
            f"{guard}ld.relaxed.{scope}.global.v4.b32 {{{four}}}, [from{r}+{16 * THREADS.value * k}];"
        )
    return _until_tagged(
        operands,
        [f".reg .pred all; .reg .b32 w<{count}>; .reg .b64 from<{ranks}>;"],
        [f"setp.ne.s32 all, {whole}, 0;", f"mov.b64 from0, {base};",
         *(f"add.s64 from{r}, from{r - 1}, {distance};" for r in range(1, ranks)),
         *(f"mov.b32 w{i}, {operands[0]};" for i in range(count))],
        loads, [f"w{i}" for i in range(count)],
        [(r, [f"w{i + j}" for j in range(4)]) for r, _, i in places], "0xffff",
        [f"prmt.b32 ${j}, w{2 * j}, w{2 * j + 1}, 0x7632;" for j in range(count // 2)],
    )  # fmt: skip


@gluon.constexpr_function
def _constraints(results):
    return ",".join(["=&r"] * results + ["l", "l", "r", "r", "l", "l", "r"])


@gluon.constexpr_function
def _words(count):
    return tuple([gl.int32] * count)


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


TAG_BITS = gl.constexpr("0x7fffffff")
"""Of a wide word's tag, all but one: ptxas crashes (-11) where the loop ends with equal words."""


@gluon.constexpr_function
def _polling_wide(rounds):
    """Assembly for `poll_wide`: 16 bytes, two words, a thread and round.

    $0 on: the results; then the address of the thread's first two words and of its last, the tag, the address
    of the error words, the limit and the code.
    """
    count = 2 * rounds
    base, last, *operands = (f"${count + i}" for i in range(6))
    loads = []
    for k in range(rounds):
        four = f"${2 * k}, t{2 * k}, ${2 * k + 1}, t{2 * k + 1}"
        at = last if k == rounds - 1 else f"{base}+{16 * THREADS.value * k}"
        loads.append(f"ld.relaxed.gpu.global.v4.b32 {{{four}}}, [{at}];")
    words = [f"t{i}" for i in range(count)]
    return _until_tagged(operands, [f".reg .b32 t<{count}>;"], [], loads, words, [], TAG_BITS.value, [])


@gluon.constexpr_function
def _wide_constraints(results):
    return ",".join(["=&r"] * results + ["l", "l", "r", "l", "l", "r"])


@gluon.constexpr_function
def _floats(count):
    return tuple([gl.float32] * count)


@gluon.jit
def poll_wide(address, tag, waits, code, COUNT: gl.constexpr):
    """COUNT float32 numbers, an even number, that came as words of 8 bytes, as int32: by round, two a thread.

    Numbers 2 t and 2 t + 1 of each 2 x THREADS; past the end the last two.
    """
    ROUNDS: gl.constexpr = (COUNT + 2 * THREADS - 1) // (2 * THREADS)
    thread = gl.arange(0, THREADS, LINE)
    last = gl.minimum((ROUNDS - 1) * 2 * THREADS + 2 * thread, COUNT - 2).to(gl.int64)
    return gl.inline_asm_elementwise(
        _polling_wide(ROUNDS), _wide_constraints(2 * ROUNDS),
        [address + thread.to(gl.int64) * 16, address + last * 8, tag, waits[0], waits[1], code],
        _words(2 * ROUNDS), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def _publishing_wide(scope, count):
    words = ", ".join(f"${2 + i}, ${2 + count}" for i in range(count))
    return pushing(words, f"setp.ne.s32 wanted, ${3 + count}, 0;", scope)


@gluon.jit
def publish_wide(address, value, tag, wanted, SCOPE: gl.constexpr):
    """Store float32 numbers as words of 8 bytes where wanted."""
    gl.inline_asm_elementwise(
        _publishing_wide(SCOPE, 1), "=r,l,r,r,r",
        [address, value.to(gl.int32, bitcast=True), tag, wanted.to(gl.int32)], gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def publish_wides(address, first, second, tag, wanted):
    """`publish_wide` of two numbers next to each other, within this GPU."""
    gl.inline_asm_elementwise(
        _publishing_wide("gpu", 2), "=r,l,r,r,r,r",
        [address, first.to(gl.int32, bitcast=True), second.to(gl.int32, bitcast=True), tag,
         wanted.to(gl.int32)],
        gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def _polling_sources(ranks, parts, scope):
    """Assembly for `poll_sources`.

    $0 on: the results; then the address of the first source's word, the distance of the sources', whether
    this thread polls, the tag, the address of the error words, the limit and the code.
    """
    count = ranks * parts
    base, distance, wanted, *operands = (f"${count + i}" for i in range(7))
    return _until_tagged(
        operands,
        [f".reg .b32 v<{count}>, t<{count}>; .reg .b64 from<{count}>;"],
        [*(f"mov.b32 v{i}, 0;" for i in range(count)),
         f"setp.eq.s32 again, {wanted}, 0;", "@again bra over;", f"mov.b64 from0, {base};",
         *(f"add.s64 from{i}, from{i - 1}, {distance};" for i in range(1, count))],
        [f"ld.relaxed.{scope}.global.v2.b32 {{v{i}, t{i}}}, [from{i}];" for i in range(count)],
        [f"t{i}" for i in range(count)], [(i // parts, [f"t{i}"]) for i in range(count)], TAG_BITS.value,
        [f"mov.b32 ${i}, v{i};" for i in range(count)],
    )  # fmt: skip


@gluon.constexpr_function
def _source_constraints(count):
    return ",".join(["=&f"] * count + ["l", "l", "r", "r", "l", "l", "r"])


@gluon.jit
def poll_sources(
    address, distance, wanted, tag, waits, code, RANKS: gl.constexpr, PARTS: gl.constexpr, SCOPE: gl.constexpr
):
    """A float32 number, one a thread where wanted, from each of PARTS sources on RANKS ranks.

    They come as wide words, each source's `distance` bytes after the one before.
    """
    distance = gl.to_tensor(distance).to(gl.int64)
    return gl.inline_asm_elementwise(
        _polling_sources(RANKS, PARTS, SCOPE), _source_constraints(RANKS * PARTS),
        [address, distance, wanted.to(gl.int32), tag, waits[0], waits[1], code], _floats(RANKS * PARTS),
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
        pushing("$2", "setp.ne.s32 wanted, $3, 0;", SCOPE), "=r,l,r,r",
        [address, word, wanted.to(gl.int32)], gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


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
