"""A sequence's logits do not depend on how its tokens are fed, nor on who shares the batch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.checkpoint.ours import Ours
from tests.models.running import SLOTS, Run, at_once, in_chunks, load

Checkpoint = Callable[[str], Path]


@pytest.fixture(params=["mamba", "mamba-biases", "falcon_mamba", "zamba"])
def ours(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Ours:
    return load(checkpoint(request.param))


def prompts_of(lengths: list[int]) -> list[list[int]]:
    return [torch.randint(97, (n,)).tolist() for n in lengths]


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("length", [3, 64, 100])
def test_prefill_in_chunks_equals_prefill_at_once(ours: Ours, length: int, chunk: int) -> None:
    (prompt,) = prompts_of([length])
    assert_close(in_chunks(ours, prompt, chunk), at_once(ours, prompt), rtol=0, atol=1e-4)


def test_decode_token_by_token_equals_prefill_at_once(ours: Ours) -> None:
    (prompt,) = prompts_of([40])
    run = Run(ours)
    slots = run.begin()
    logits = torch.cat([run.step(slots, [[token]], decode=True)[0] for token in prompt])
    assert_close(logits, at_once(ours, prompt), rtol=0, atol=1e-4)


def test_a_ragged_batch_equals_each_prompt_alone(ours: Ours) -> None:
    prompts = prompts_of([1, 33, 2, 70, 5])
    run = Run(ours)
    together = run.step(run.begin(len(prompts)), prompts)
    for prompt, logits in zip(prompts, together, strict=True):
        assert_close(logits, at_once(ours, prompt), rtol=0, atol=1e-4)


def test_sequences_that_begin_continue_and_decode_share_a_step(ours: Ours) -> None:
    first, second, third = prompts_of([30, 41, 9])
    run = Run(ours)
    one, two = run.begin(2)
    run.step([one, two], [first[:29], second[:20]])
    (three,) = run.begin()
    logits = run.step([three, one, two], [third, first[29:], second[20:]])
    for prompt, rows in zip([third, first, second], logits, strict=True):
        assert_close(rows, at_once(ours, prompt)[-len(rows) :], rtol=0, atol=1e-4)


def test_decode_of_all_slots_equals_each_sequence_alone(ours: Ours) -> None:
    """Slots in another order than in the prefill, and at different places of their sequences."""
    prompts = prompts_of([1 + n % 7 for n in range(SLOTS)])
    run = Run(ours)
    slots = run.begin(SLOTS)
    run.step(slots, [prompt[:-1] or prompt for prompt in prompts])
    last = [prompt[-1] for prompt in prompts]
    order = torch.randperm(SLOTS).tolist()
    logits = run.step([slots[i] for i in order], [[last[i]] for i in order], decode=True)
    for i, rows in zip(order, logits, strict=True):
        alone = at_once(ours, [*(prompts[i][:-1] or prompts[i]), last[i]])
        assert_close(rows[0], alone[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize("poison", ["tokens", "nan-state"])
def test_what_a_neighbour_contains_never_changes_a_row(ours: Ours, decode: bool, poison: str) -> None:
    """Bit for bit, given the same shapes: beside other tokens, or beside a state of NaN."""
    lengths = [1, 1, 1] if decode else [40, 35, 3]
    begun, new = prompts_of([6, 9, 4]), prompts_of(lengths)

    def rows_beside(neighbour: str | None) -> list[torch.Tensor]:
        run = Run(ours)
        slots = run.begin(3)
        run.step(slots, begun)
        if neighbour == "nan-state":
            poison_slot(run, slots[1])
        beside = prompts_of(lengths)[1] if neighbour == "tokens" else new[1]
        logits = run.step(slots, [new[0], beside, new[2]], decode)
        return [logits[0], logits[2]]

    for row, alone in zip(rows_beside(poison), rows_beside(None), strict=True):
        assert torch.equal(row, alone)
        assert not row.isnan().any()


def poison_slot(run: Run, slot: int) -> None:
    """NaN in everything that a sequence has stored."""
    for mixer in run.state.mixers:
        mixer.conv[slot] = torch.nan
        mixer.ssm[slot] = torch.nan
    for site in run.state.attention:
        site.keys[run.tables[slot].long()] = torch.nan
        site.values[run.tables[slot].long()] = torch.nan
