"""The scheduler: every token of every prompt exactly once, in order, within the chunk's budget."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_dist.models.batch import StateShapes
from ssm_dist.prefix_cache import PrefixCache
from ssm_dist.sampling.params import SamplingParams
from ssm_dist.scheduler import Scheduler, Sequence
from ssm_dist.state_cache import StateCache

SHAPES = StateShapes(conv=(1, 1), ssm=(1, 1), layers=1)


def make(slots: int, chunk_tokens: int) -> Scheduler:
    cache = StateCache(
        SHAPES, max_sequences=slots, max_tokens=1, dtype=torch.float32, state_dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    return Scheduler(PrefixCache(cache), chunk_tokens)


def drive(scheduler: Scheduler, sequences: list[Sequence]) -> list[list[tuple[int, int, int]]]:
    """Run to the end, sampling token 7 always; (sequence, start, length) of every chunk of every step."""
    for sequence in sequences:
        scheduler.add(sequence)
    steps = []
    while True:
        _, step = scheduler.next_step()
        if step is None:
            return steps
        steps.append([(c.sequence.index, c.start, c.length) for c in step.chunks])
        for c in step.chunks:
            if c.end == c.sequence.length:
                c.sequence.sampled += 1
                if c.sequence.sampled == c.sequence.params.max_new_tokens:
                    scheduler.finish(c.sequence)


def sequence(index: int, prompt: int, new: int) -> Sequence:
    return Sequence(index, list(range(prompt)), SamplingParams(max_new_tokens=new))


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 6)), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(1, 12),
)
def test_every_token_is_absorbed_once_and_in_order(lengths, slots, chunk_tokens):
    steps = drive(make(slots, chunk_tokens), [sequence(i, p, n) for i, (p, n) in enumerate(lengths)])
    for index, (prompt, new) in enumerate(lengths):
        runs = [(start, length) for step in steps for i, start, length in step if i == index]
        absorbed = [position for start, length in runs for position in range(start, start + length)]
        assert absorbed == list(range(prompt + new - 1))
    for step in steps:
        assert len({i for i, _, _ in step}) == len(step) <= max(slots, chunk_tokens)
        assert sum(length for _, _, length in step) <= max(slots, chunk_tokens)


def test_a_long_prompt_does_not_hold_up_those_that_are_decoding():
    steps = drive(make(2, 4), [sequence(0, 2, 8), sequence(1, 40, 1)])
    decoded = [n for n, step in enumerate(steps) if (0, 2, 1) in step or (0, 3, 1) in step]
    last_of_long_prompt = max(n for n, step in enumerate(steps) if any(i == 1 for i, _, _ in step))
    assert max(decoded) < last_of_long_prompt


def test_short_prompts_share_a_step():
    steps = drive(make(4, 16), [sequence(i, 3, 1) for i in range(4)])
    assert steps == [[(0, 0, 3), (1, 0, 3), (2, 0, 3), (3, 0, 3)]]


def test_the_order_of_arrival_is_the_order_of_admission():
    scheduler = make(1, 8)
    for index in range(3):
        scheduler.add(sequence(index, 2, 1))
    order = []
    while (admitted := scheduler.next_step()[0]) or order[-1:] != [2]:
        order += [s.index for s in admitted]
        for s in admitted:
            scheduler.finish(s)
    assert order == [0, 1, 2]
