"""The prefix index against a dictionary searched from the longest prefix down."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_dist.prefix_index import Node, PrefixIndex

IDS = st.lists(st.integers(0, 2), min_size=1, max_size=9)


def nodes(node: Node[int]) -> int:
    return 1 + sum(nodes(child) for child in node.children.values())


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(["set", "remove", "find"]), IDS), max_size=40))
def test_the_index_finds_what_a_search_of_all_prefixes_finds(calls):
    index, known, places = PrefixIndex(), {}, {}
    for number, (action, ids) in enumerate(calls):
        if action == "set":
            places[tuple(ids)] = index.node(ids)
            places[tuple(ids)].value = known[tuple(ids)] = number
        elif action == "remove" and known:
            key = sorted(known)[number % len(known)]
            index.remove(places.pop(key))
            del known[key]
        wanted = next((known[p] for n in range(len(ids), 0, -1) if (p := tuple(ids[:n])) in known), None)
        assert index.longest(ids) == wanted
    assert nodes(index._root) <= 2 * len(known) + 1
    for place in places.values():
        index.remove(place)
    assert not index and nodes(index._root) == 1


def test_finding_takes_time_proportional_to_the_prompt():
    def seconds(length: int) -> float:
        ids, index = list(range(length)), PrefixIndex()
        for end in range(1000, length + 1, 1000):
            index.node(ids[:end]).value = end
        begin = time.perf_counter()
        assert all(index.longest(ids) == length for _ in range(5))
        return time.perf_counter() - begin

    seconds(8000)
    assert min(seconds(128_000) for _ in range(3)) < 60 * min(seconds(8000) for _ in range(3))
