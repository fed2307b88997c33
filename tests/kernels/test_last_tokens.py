"""The last tokens and their places, by slot: the definitions, and the Triton kernels in the interpreter."""

from collections.abc import Iterator

import pytest
import torch

from ssm_dist import kernels
from ssm_dist.kernels import backend

NOBODY = 300


@pytest.fixture(params=["reference", "triton"], autouse=True)
def _either(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "triton":
        request.getfixturevalue("triton_backend")
    with backend.using(request.param, "cpu"):
        yield


def memory() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and places of 300 slots and nobody's."""
    tokens, places = torch.randint(1, 2**40, (2, NOBODY + 1))
    places[NOBODY] = 0
    return tokens, places


@pytest.mark.parametrize("slots", [[], [7], [NOBODY], [3, 0, 299, NOBODY, NOBODY], [*range(300)]], ids=len)
def test_a_step_begins_with_what_the_last_one_stored(slots: list[int]) -> None:
    last_token, last_place = memory()
    named = torch.tensor(slots, dtype=torch.int64)
    sampled = torch.randint(0, 2**40, named.shape)
    tokens, places, next_places, narrow = kernels.load_last(last_token, last_place, named)
    assert tokens.tolist() == [last_token[s].item() for s in slots]
    assert places.tolist() == [last_place[s].item() for s in slots]
    assert next_places.tolist() == [last_place[s].item() + 1 for s in slots]
    assert narrow.dtype == torch.int32 and narrow.tolist() == slots

    expected_token, expected_place = last_token.clone(), last_place.clone()
    for slot, token, place in zip(slots, sampled.tolist(), next_places.tolist(), strict=True):
        if slot != NOBODY:
            expected_token[slot], expected_place[slot] = token, place
    kernels.store_last(last_token, last_place, named, sampled, next_places, NOBODY)
    assert torch.equal(last_token[:NOBODY], expected_token[:NOBODY])
    assert torch.equal(last_place, expected_place)


def test_a_step_compiles_whole_with_its_memory_in_place() -> None:
    last_token, last_place = memory()
    slots = torch.tensor([5, 1, NOBODY])
    expected = last_token[slots] * 2, torch.tensor([last_place[5] + 1, last_place[1] + 1, 0])

    def step(slots: torch.Tensor) -> torch.Tensor:
        tokens, _, places, narrow = kernels.load_last(last_token, last_place, slots)
        kernels.store_last(last_token, last_place, slots, tokens * 2, places, NOBODY)
        return narrow + 0

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(slots), slots.int())
    assert torch.equal(last_token[slots], expected[0]) and torch.equal(last_place[slots], expected[1])
