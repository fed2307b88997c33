"""What the programs of `gluon_layers_few` hand each other, by way of shared memory (Gluon, sm_90)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ssm_dist.kernels.gluon_layers_few_steps import over_warp
from ssm_dist.kernels.gluon_layers_steps import ROUND
from ssm_dist.kernels.gluon_shared import load_word, store1, store2
from ssm_dist.kernels.gluon_warp import barrier
from ssm_dist.kernels.gluon_words import LINE, THREADS, high, low, poll, poll_wide, publish, rounded

BATCH = gl.constexpr(20)
"""Rounds of words that a poll takes at once."""


@gluon.constexpr_function
def _of_batch(count, begin):
    return min(count - begin * ROUND.value, BATCH.value * ROUND.value)


@gluon.jit
def _take(
    to, words, tag, waits, code,
    FIRST: gl.constexpr, COUNT: gl.constexpr, WIDTH: gl.constexpr, SEQ: gl.constexpr,
):  # fmt: skip
    thread = gl.arange(0, THREADS, LINE)
    came = poll(words + FIRST * 4, 0, tag, waits, code, COUNT, 1, "gpu")
    for k in gl.static_range((COUNT + ROUND - 1) // ROUND):
        number = FIRST + k * ROUND + thread * 4
        store2(to + number * 2 + gl.minimum(number // WIDTH, SEQ) * 64, came[2 * k], came[2 * k + 1])


@gluon.jit
def receive(
    to, words, tag, waits, code, COUNT: gl.constexpr, WIDTH: gl.constexpr, SEQ: gl.constexpr
):  # fmt: skip
    """Put COUNT numbers, which come as words in a row, into shared memory in bfloat16, for all threads.

    Of the first SEQ times WIDTH, each WIDTH begin 64 bytes after the last: in other banks for `inputs_of`.
    """
    for begin in gl.static_range(0, (COUNT + ROUND - 1) // ROUND, BATCH):
        _take(to, words, tag, waits, code, begin * ROUND, _of_batch(COUNT, begin), WIDTH, SEQ)
    barrier()


@gluon.jit
def receive_wide(to, words, tag, waits, code, COUNT: gl.constexpr):
    """Put COUNT float32 numbers, which come as wide words in a row, into shared memory, for all threads."""
    thread = gl.arange(0, THREADS, LINE)
    came = poll_wide(words, tag, waits, code, COUNT)
    for k in gl.static_range((COUNT + 2 * THREADS - 1) // (2 * THREADS)):
        store2(to + (k * THREADS + thread) * 8, came[2 * k], came[2 * k + 1])
    barrier()


@gluon.jit
def send(
    stream, gain, tag, words, at, wanted, P: gl.constexpr, SEQ: gl.constexpr, H: gl.constexpr
):  # fmt: skip
    """Hand over this program's columns of the stream times the norm's weight, and their squares' sums.

    Warp s has sequence s, lane r column r. A sum goes as two numbers, rounded and the rest.
    """
    thread = gl.arange(0, THREADS, LINE)
    publish(words + at.to(gl.int64) * 4, stream * gain, tag, wanted, "gpu")
    sum = over_warp(gl.where(wanted, stream * stream, 0.0))
    rest = sum - rounded(sum)
    lane, warp = thread % 32, thread // 32
    to = words + SEQ * H * 4 + ((gl.program_id(0) * SEQ + warp) * 2 + lane).to(gl.int64) * 4
    publish(to, gl.where(lane == 0, sum, rest), tag, (lane < 2) & (warp < SEQ), "gpu")


@gluon.jit
def find_scales(scales, squares, eps, P: gl.constexpr, SEQ: gl.constexpr, H: gl.constexpr):
    """The norm's scale of each sequence, to `scales`, from the squares' sums of all programs.

    Both are in shared memory; after the next barrier for all threads.
    """
    thread = gl.arange(0, THREADS, LINE)
    lane, sequence = thread % 32, gl.minimum(thread // 32, SEQ - 1)
    sum = gl.zeros([THREADS], gl.float32, LINE)
    for k in gl.static_range((P + 31) // 32):
        source = k * 32 + lane
        both = load_word(squares + (gl.minimum(source, P - 1) * SEQ + sequence) * 4)
        sum += gl.where(source < P, low(both) + high(both), 0.0)
    store1(scales + sequence * 4, gl.rsqrt(over_warp(sum) / H + eps))
