"""Steps padded to the sizes of captured ones, and tokens read late: nothing of it shows in the answers."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from ssm_dist import LLM, SamplingParams, prefill
from ssm_dist.generation import Run
from ssm_dist.graphs import bucket, buckets
from ssm_dist.prefix_cache import PrefixCache
from ssm_dist.requests import Request
from tests.engine.checkpoints import save_checkpoint
from tests.engine.exact import HYBRID, PURE, exact_continuation, exact_engine

PROMPTS = [[3] * 37, [5, 1, 2], [7], [2, 2] * 9, [11] * 5]


class Padding:
    """In the place of `Graphs`: runs every step as it would be captured, after an idle one."""

    def __init__(self) -> None:
        self.keys: list[Any] = []

    def run(
        self, key: Hashable, function: Callable[[Tensor], Any], numbers: Tensor,
        idle: Callable[[], Tensor], *, lazy: bool = False,
    ) -> Any:  # fmt: skip
        assert numbers.shape == idle().shape
        self.keys.append(key)
        function(idle())
        return function(numbers)


@pytest.mark.parametrize("overlap_tokens", [0, 4])
@pytest.mark.parametrize("paged", [False, True])
def test_padded_steps_on_an_exact_model_answer_as_each_request_alone(
    paged: bool, overlap_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "LEAST_STEP", 2)  # so that short steps have padded halves
    engine = exact_engine(HYBRID if paged else PURE, 4, 256)
    engine.graphs = padding = Padding()
    engine.prefill.chunk_tokens, engine.prefill.overlap_tokens = 16, overlap_tokens
    run = Run(engine, PrefixCache(engine.cache), None, (), 16)
    requests = [Request(i, None, p, SamplingParams(max_new_tokens=9)) for i, p in enumerate(PROMPTS)]
    answers: dict[int, list[int]] = {i: [] for i in range(len(PROMPTS))}
    for event in run.events(requests):
        answers[event.index].append(event.token_id)
    assert answers == {i: exact_continuation(p, 9, paged=paged) for i, p in enumerate(PROMPTS)}
    assert {key[0] for key in padding.keys} == {"prefill", "decode"}
    halved = [key for key in padding.keys if key[0] == "prefill" and len(key) > 2]
    assert bool(halved) == bool(overlap_tokens)


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "zamba"])
def test_padded_steps_answer_as_plain_ones(name: str, tmp_path: Path) -> None:
    folder = save_checkpoint(name, tmp_path / name)
    params = SamplingParams(max_new_tokens=24, ignore_eos=True)
    llm = LLM.from_pretrained(folder, cache={"max_sequences": 5}, prefill={"chunk_tokens": 16})
    prompts: list[Any] = [*PROMPTS, [1, 2, 3, 4]]
    plain = [c.token_ids for c in llm.generate(prompts, params)]
    llm.engine.graphs = Padding()
    assert [c.token_ids for c in llm.generate(prompts, params)] == plain


def test_an_end_that_is_read_late_hides_the_token_after_it(tmp_path: Path) -> None:
    """Stopping by a token leaves one step in flight; its token is nobody's, and its slot is free."""
    engine = exact_engine(PURE, 1, 1)
    alone = exact_continuation([4, 2], 12, paged=False)
    stop = alone[5]
    run = Run(engine, PrefixCache(engine.cache), None, (stop,), 8)
    requests = [Request(i, None, [4, 2], SamplingParams(max_new_tokens=12)) for i in range(3)]
    answers: dict[int, list[int]] = {0: [], 1: [], 2: []}
    reasons = {}
    for event in run.events(requests):
        answers[event.index].append(event.token_id)
        reasons[event.index] = event.finish_reason
    expected = alone[: alone.index(stop) + 1]
    assert answers == {0: expected, 1: expected, 2: expected} and set(reasons.values()) == {"stop"}
    assert engine.cache.free_slots == 1


def test_buckets_waste_less_than_their_step() -> None:
    for parts in (2, 8):
        sizes = buckets(300, parts)
        assert sizes[0] == 1 and sizes[-1] == 300 and sizes == sorted(set(sizes))
        for count in range(1, 301):
            size = bucket(count, 300, parts)
            assert size in sizes and count <= size < count * (1 + 1 / parts) + 1
