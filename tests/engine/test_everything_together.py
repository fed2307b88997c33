"""Requests, cancellations, ends, snapshots, evictions and states put from outside, in any order.

After every call, the books are checked: each slot and each page is held by exactly those who say so, each
level is within its budget, and the index knows what the levels hold. At the end, each answer is the one that
its request gets alone.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ssm_dist.generation import Run
from ssm_dist.prefix_cache import PrefixCache
from ssm_dist.prefix_index import Node
from ssm_dist.prefix_limits import PrefixLimits
from ssm_dist.requests import Request
from ssm_dist.sampling.params import SamplingParams
from ssm_dist.snapshots import Snapshot
from tests.engine.exact import HYBRID, PURE, VOCAB, exact_continuation, exact_engine, exact_state

PAGES, MOST_NEW, EOS = 6, 6, 3
IDS = st.integers(0, VOCAB - 1)


def snapshots_below(node: Node[Snapshot]) -> list[Snapshot]:
    own = [] if node.value is None else [node.value]
    return own + [snapshot for child in node.children.values() for snapshot in snapshots_below(child)]


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.prompts: dict[int, list[int]] = {}
        self.answers: dict[int, list[int]] = {}
        self.ends: dict[int, str] = {}
        self.histories: list[list[int]] = [[1, 2, 3]]
        self.held: list[list[int]] = []

    @initialize(
        paged=st.booleans(),
        snapshots=st.integers(0, 3),
        host=st.sampled_from([0, 150, 500]),
        files=st.sampled_from([0, 300]),
        grid=st.sampled_from([(8, 8), (8, 16), (16, 8), (5, 5)]),
        eos=st.booleans(),
    )
    def start(self, paged, snapshots, host, files, grid, eos):
        self.paged, self.slots = paged, snapshots
        self.engine = exact_engine(HYBRID if paged else PURE, 2, PAGES * 16, snapshots)
        self.limits = PrefixLimits(grid[0], host, Path(self.folder.name) if files else None, files)
        reuses = snapshots or host or files
        self.prefixes = PrefixCache(self.engine.cache, self.limits if reuses else None)
        self.eos = {EOS} if eos else set()
        self.run = Run(self.engine, self.prefixes, None, self.eos, grid[1])

    @rule(data=st.data(), more=st.lists(IDS, min_size=1, max_size=30), new=st.integers(1, MOST_NEW))
    def submit(self, data, more, new):
        begun = data.draw(st.sampled_from(self.histories))
        prompt = (begun[: data.draw(st.integers(0, len(begun)))] + more)[: PAGES * 16 - MOST_NEW]
        index = len(self.prompts)
        self.prompts[index], self.answers[index] = prompt, []
        self.run.add(Request(index, None, prompt, SamplingParams(max_new_tokens=new)))

    @precondition(lambda self: self.run.active)
    @rule(data=st.data())
    def cancel(self, data):
        event = self.run.cancel(data.draw(st.sampled_from(self.run.indices)))
        self.ends[event.index] = event.finish_reason

    @rule(steps=st.integers(1, 6))
    def step(self, steps):
        for _ in range(steps):
            self.advance()

    def advance(self):
        for event in self.run.execute(self.run.plan()):
            assert event.index not in self.ends
            self.answers[event.index].append(event.token_id)
            if event.finish_reason is not None:
                self.ends[event.index] = event.finish_reason
                self.histories.append(self.prompts[event.index] + self.answers[event.index])

    @rule(data=st.data())
    def put(self, data):
        history = data.draw(st.sampled_from(self.histories))
        self.prefixes.put(history, exact_state(history, paged=self.paged))
        self.held.append(history)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def remove(self, data):
        self.prefixes.remove(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def every_slot_and_page_is_held_by_those_who_say_so(self):
        cache = self.engine.cache
        kept = [s.kept for s in self.known() if s.kept is not None]
        taken = [*cache._free_snapshots, *(k.slot for k in kept)]
        assert len(set(taken)) == len(taken) == self.slots
        running = [s.slot for s in self.run._scheduler._running]
        assert sorted([*cache._free_slots, *running]) == [0, 1] and sorted(cache._pages) == sorted(running)
        pool = cache.pool
        users = Counter(page for pages in cache._pages.values() for page in pages)
        keepers = Counter(page for k in kept for page in k.pages)
        pages = range(PAGES if self.paged else 0)
        assert [pool._users[p] for p in pages] == [users[p] for p in pages]
        assert [pool._keepers[p] for p in pages] == [keepers[p] for p in pages]
        assert sorted(pool._free) == [p for p in pages if not users[p] and not keepers[p]]
        assert pool.reclaimable == sum(not users[p] and keepers[p] > 0 for p in pages)

    @invariant()
    def every_level_holds_what_the_index_knows_within_its_budget(self):
        known, prefixes = self.known(), self.prefixes
        device, host, files = ({*tier._sizes} for tier in (prefixes._device, prefixes._host, prefixes._files))
        assert device == {s for s in known if s.kept is not None}
        assert host == {s for s in known if s.host is not None and not s.pinned}
        assert files == {s for s in known if s.file is not None}
        assert all(s.kept or s.host or s.file for s in known)
        on_host, in_files = prefixes.bytes_held[1:]
        assert on_host <= self.limits.host_bytes and in_files <= self.limits.folder_bytes
        assert len(list(Path(self.folder.name).rglob("*.safetensors"))) == len(files)

    def known(self) -> list[Snapshot]:
        return snapshots_below(self.prefixes._index._root)

    def teardown(self):
        if self.prompts:
            while self.run.active:
                self.advance()
            self.every_slot_and_page_is_held_by_those_who_say_so()
            self.every_level_holds_what_the_index_knows_within_its_budget()
        for index, prompt in self.prompts.items():
            alone = exact_continuation(prompt, MOST_NEW, paged=self.paged)
            answer = self.answers[index]
            assert answer == alone[: len(answer)]
            ended = bool(answer) and answer[-1] in self.eos
            assert (self.ends[index] == "stop") == ended and not self.eos & {*answer[:-1]}
        self.folder.cleanup()


TestEverythingTogether = Machine.TestCase
TestEverythingTogether.settings = settings(deadline=None, max_examples=80, stateful_step_count=40)
