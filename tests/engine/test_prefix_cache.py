"""Prefix reuse: the same tokens, less work, nothing leaked, within the budgets."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssm_dist import LLM, SamplingParams, UserError, prefix_cache
from ssm_dist.engine import Engine
from ssm_dist.generation import Run
from ssm_dist.prefix_cache import PrefixCache
from ssm_dist.prefix_limits import PrefixLimits
from ssm_dist.requests import Request
from tests.engine.checkpoints import save_checkpoint
from tests.engine.exact import HYBRID, PURE, VOCAB, exact_continuation, exact_engine
from tests.engine.on_ranks import conversation
from tests.ranks import run_on_ranks

SLOT, PAGE = 8, 128
"""Bytes of a slot and of a page of the exact model."""


def answer(run: Run, index: int, prompt: list[int], new: int) -> list[int]:
    run.add(Request(index, None, prompt, SamplingParams(max_new_tokens=new)))
    tokens = []
    while (step := run.plan()) is not None:
        tokens += [e.token_id for e in run.execute(step)]
    return tokens


def make(shapes=HYBRID, snapshots=4, tokens=256, chunk=8, **limits) -> tuple[Engine, PrefixCache, Run]:
    engine = exact_engine(shapes, 2, tokens, snapshots)
    prefixes = PrefixCache(engine.cache, PrefixLimits(**{"interval": 8} | limits))
    return engine, prefixes, Run(engine, prefixes, None, (), chunk)


def test_a_known_prefix_is_not_computed_again():
    _, prefixes, run = make()
    first, longer = list(range(20)), [*range(20), 3, 1]
    answer(run, 0, first, 1)
    assert answer(run, 1, longer, 3) == exact_continuation(longer, 3, paged=True)
    assert (prefixes.counters.hits, prefixes.counters.misses, prefixes.counters.tokens_saved) == (1, 1, 20)


def test_the_same_prompt_again_starts_at_the_last_interval_before_its_end():
    _, prefixes, run = make()
    answer(run, 0, list(range(20)), 1)
    assert answer(run, 1, list(range(20)), 4) == exact_continuation(list(range(20)), 4, paged=True)
    assert prefixes.counters.tokens_saved == 16


def test_a_conversation_continues_from_the_end_of_the_answer():
    _, prefixes, run = make()
    history, before = [1, 2, 3], -1
    for turn in range(4):
        new = answer(run, turn, history, 5)
        assert new == exact_continuation(history, 5, paged=True)
        known = len(history) + 4
        history = [*history, *new, 7, turn]
        saved = prefixes.counters.tokens_saved
        assert saved > before
        before = saved
    answer(run, 9, history, 1)
    assert prefixes.counters.tokens_saved - before == known


PROMPTS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 40), st.lists(st.integers(0, VOCAB - 1), max_size=3)),
    min_size=1, max_size=14,
)  # fmt: skip
BUDGETS = st.tuples(st.integers(0, 3), st.integers(0, 900), st.integers(0, 900))


@settings(deadline=None, max_examples=80)
@given(PROMPTS, BUDGETS, st.booleans(), st.integers(1, 3), st.data())
def test_whatever_is_evicted_the_tokens_are_those_without_reuse(prompts, budgets, paged, together, data):
    snapshots, host, files = budgets
    with tempfile.TemporaryDirectory() as folder:
        engine = exact_engine(HYBRID if paged else PURE, 2, 96, snapshots)
        limits = PrefixLimits(8, host, Path(folder) if files else None, files)
        prefixes = PrefixCache(engine.cache, limits)
        run = Run(engine, prefixes, None, (), 16)
        waiting = {
            i: [(kind * 5 + j * (kind + 1)) % VOCAB for j in range(length)] + tail
            for i, (kind, length, tail) in enumerate(prompts)
        }
        tokens: dict[int, list[int]] = {i: [] for i in waiting}
        cancelled = set()
        arrivals = list(waiting)
        while arrivals or run.active:
            while arrivals and len(run.indices) < together:
                index = arrivals.pop(0)
                run.add(Request(index, None, waiting[index], SamplingParams(max_new_tokens=4)))
            if data.draw(st.integers(0, 19)) == 0:
                cancelled.add(run.indices[0])
                run.cancel(run.indices[0])
            step = run.plan()
            assert step is not None or not run.active
            for event in run.execute(step) if step else []:
                tokens[event.index].append(event.token_id)
            device, on_host, in_files = prefixes.bytes_held
            assert device <= snapshots * SLOT and on_host <= host and in_files <= files
            assert len(list(Path(folder).rglob("*.safetensors"))) == len(prefixes._files._sizes)
        for index, prompt in waiting.items():
            wanted = exact_continuation(prompt, 4, paged=paged)
            assert tokens[index] == (wanted[: len(tokens[index])] if index in cancelled else wanted)
        pool = engine.cache.pool
        assert engine.cache.free_slots == 2
        assert pool.free + pool.reclaimable == (6 if paged else 0)
        assert engine.cache.acquire(96) is not None and (not paged or pool.free == 0)


def test_states_move_from_the_device_to_the_host_to_a_file_and_back(tmp_path: Path):
    size = SLOT + PAGE
    engine, prefixes, run = make(
        snapshots=1, host_bytes=size, folder=tmp_path, folder_bytes=size, interval=16, chunk=16
    )
    prompts = [[k] * 10 for k in range(4)]
    for index, prompt in enumerate(prompts):
        answer(run, index, prompt, 1)
    assert prefixes.bytes_held == (SLOT, size, size) and len(list(tmp_path.rglob("*.safetensors"))) == 1
    longer = [*prompts[1], 5]
    assert answer(run, 9, longer, 2) == exact_continuation(longer, 2, paged=True)
    assert prefixes.counters.hits == 1 and engine.cache.free_slots == 2


@pytest.mark.parametrize("snapshots", [0, 1, 2])
@pytest.mark.parametrize("host_bytes", [0, SLOT + PAGE])
def test_a_full_disk_ends_the_run_and_leaves_nothing_behind(
    snapshots: int, host_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    engine, prefixes, run = make(
        snapshots=snapshots, tokens=64, host_bytes=host_bytes, folder=tmp_path, folder_bytes=10**6,
        interval=16, chunk=16,
    )  # fmt: skip
    full, refused, save = [], 0, prefix_cache.save_file

    def save_unless_full(tensors: dict[str, Tensor], file: Path) -> None:
        file.write_bytes(b"a part")
        if full:
            raise OSError("no space left")
        save(tensors, file)

    monkeypatch.setattr(prefix_cache, "save_file", save_unless_full)
    for index in range(24):
        full[:] = [True] * (index % 4 < 2)
        prompt = [index % 5] * (9 + index % 3)
        try:
            tokens = answer(run, 2 * index, prompt, 2)
        except UserError as error:
            assert "cannot write" in str(error)
            refused += 1
            run.close()
        else:
            assert tokens == exact_continuation(prompt, 2, paged=True)
        assert engine.cache.free_slots == 2
        assert engine.cache.pool.free + engine.cache.pool.reclaimable == 4
        assert len(list(tmp_path.rglob("*.safetensors"))) == prefixes.bytes_held[2] // (SLOT + PAGE)
    assert refused and prefixes.counters.hits


def test_an_error_while_requests_are_admitted_ends_those_admitted_before(monkeypatch: pytest.MonkeyPatch):
    engine, prefixes, run = make()
    acquired, acquire = [], prefixes.acquire

    def fail_after_one(prompt_ids: list[int], tokens: int) -> tuple[int, int] | None:
        if acquired:
            raise UserError("no space left")
        acquired.append(acquire(prompt_ids, tokens))
        return acquired[-1]

    monkeypatch.setattr(prefixes, "acquire", fail_after_one)
    requests = [Request(index, None, [1, 2], SamplingParams()) for index in range(2)]
    with pytest.raises(UserError, match="no space left"):
        list(run.events(requests))
    assert engine.cache.free_slots == 2 and not run.active


def test_a_state_taken_again_changes_places_with_the_one_that_leaves_the_device():
    _, prefixes, run = make(PURE, snapshots=1, host_bytes=SLOT)
    for index, token in enumerate([1, 2, 1]):
        answer(run, index, [token] * 4, 1)
    assert prefixes.bytes_held == (SLOT, SLOT, 0)
    answer(run, 3, [2] * 5, 1)
    assert prefixes.counters.hits == 1


def test_two_snapshots_share_the_pages_of_what_they_have_in_common():
    engine, prefixes, run = make(interval=16, chunk=16)
    answer(run, 0, [1] * 48, 1)
    assert engine.cache.pool.reclaimable == 3 and prefixes.counters.snapshots == 3


def test_a_hybrid_prompt_that_needs_every_page_runs_although_its_prefix_is_in_the_way():
    _, _, run = make(tokens=64, interval=32, chunk=32)
    answer(run, 0, [1] * 20, 1)
    prompt = [1] * 20 + [2] * 44
    assert answer(run, 1, prompt, 1) == exact_continuation(prompt, 1, paged=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {n: save_checkpoint(n, tmp_path_factory.mktemp(n)) for n in ("mamba", "falcon_mamba", "zamba")}


def logprobs(llm: LLM, prompt: list[int]) -> list[float]:
    return llm.generate([prompt], SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=0))[0].logprobs


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "zamba"])
def test_with_reuse_at_an_interval_every_bit_is_the_same(name: str, folders: dict[str, Path]):
    prompt = [(7 * i) % 90 for i in range(61)]

    def llm(**extra: int) -> LLM:
        cache = {"max_sequences": 2, "max_tokens": 512, "prefix_interval": 16, "prefix_device_bytes": 10**6}
        return LLM.from_pretrained(folders[name], cache=cache | extra, prefill={"chunk_tokens": 16})

    reused = llm()
    cold = logprobs(reused, prompt)
    warm = logprobs(reused, prompt)
    assert reused.prefixes.counters.tokens_saved == 48 and warm == cold
    onward = logprobs(reused, [*prompt, 5, 6])
    assert reused.prefixes.counters.tokens_saved == 48 + 61
    without = logprobs(llm(prefix_device_bytes=0), [*prompt, 5, 6])
    torch.testing.assert_close(torch.tensor(onward), torch.tensor(without), atol=1e-4, rtol=0)


def test_ranks_reuse_alike(folders: dict[str, Path]):
    without, (tokens, hits, saved) = (
        conversation(folders["zamba"], 0)[0],
        conversation(folders["zamba"], 10**5),
    )
    assert tokens == without and hits == 2 and saved > 30
    for degree in (2, 4):
        assert run_on_ranks(degree, conversation, folders["zamba"], 10**5) == [(tokens, hits, saved)] * degree


def test_settings_that_do_not_go_together_are_refused(folders: dict[str, Path], tmp_path: Path):
    def refused(says: str, chunk: int = 16, **cache: object) -> None:
        with pytest.raises(UserError, match=says):
            LLM.from_pretrained(folders["mamba"], cache=cache, prefill={"chunk_tokens": chunk})

    refused("prefix_interval", prefix_interval=24, prefix_host_bytes=100)
    refused("no folder", prefix_folder=tmp_path / "none", prefix_folder_bytes=5)
    refused("go together", prefix_folder=tmp_path)
