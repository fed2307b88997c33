"""Slots and pages: exact admission, nothing shared, nothing lost."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_dist.models.batch import StateShapes
from ssm_dist.state_cache import StateCache
from ssm_dist.state_sizes import PAGE_TOKENS, state_need

PURE = StateShapes(conv=(3, 8), ssm=(8, 4), layers=2)
HYBRID = StateShapes(conv=(3, 8), ssm=(8, 4), layers=2, attention_sites=2, kv=(2, 5))


def make(shapes: StateShapes, max_sequences: int = 3, max_tokens: int = 4 * PAGE_TOKENS) -> StateCache:
    return StateCache(
        shapes, max_sequences=max_sequences, max_tokens=max_tokens, dtype=torch.bfloat16,
        state_dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip


def test_a_slot_taken_again_starts_from_zero():
    cache = make(PURE, max_sequences=1)
    slot = cache.acquire(10)
    for layer in cache.state.mixers:
        layer.conv[slot] = torch.nan
        layer.ssm[slot] = torch.nan
    cache.release(slot)
    assert cache.acquire(10) == slot
    assert all(not layer.conv.any() and not layer.ssm.any() for layer in cache.state.mixers)


def test_taking_a_slot_leaves_the_others_alone():
    cache = make(PURE, max_sequences=2)
    first = cache.acquire(1)
    for layer in cache.state.mixers:
        layer.ssm[first] = 7.0
    cache.acquire(1)
    assert all((layer.ssm[first] == 7.0).all() for layer in cache.state.mixers)


def test_a_full_cache_admits_nobody_until_a_slot_is_released():
    cache = make(PURE, max_sequences=2)
    slots = [cache.acquire(10**9), cache.acquire(10**9)]
    assert sorted(slots) == [0, 1] and cache.acquire(1) is None
    cache.release(slots[0])
    assert cache.acquire(1) == slots[0]


def test_pages_bound_the_tokens_of_a_hybrid_model_exactly():
    cache = make(HYBRID, max_tokens=3 * PAGE_TOKENS)
    assert cache.acquire(3 * PAGE_TOKENS + 1) is None
    slot = cache.acquire(2 * PAGE_TOKENS)
    assert cache.acquire(PAGE_TOKENS + 1) is None
    assert cache.acquire(PAGE_TOKENS) is not None
    cache.release(slot)
    assert cache.acquire(2 * PAGE_TOKENS) is not None


def test_the_need_computed_beforehand_is_what_is_allocated():
    for shapes in (PURE, HYBRID):
        need = state_need(shapes, 3, 4 * PAGE_TOKENS, torch.bfloat16, torch.float32)
        assert need.slots + need.kv_pages == make(shapes).bytes_allocated


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3 * PAGE_TOKENS)), max_size=40))
def test_no_page_or_slot_is_shared_or_lost(calls):
    cache, held = make(HYBRID, max_sequences=4, max_tokens=6 * PAGE_TOKENS), {}
    for release, tokens in calls:
        if release and held:
            cache.release(held.popitem()[0])
        elif (slot := cache.acquire(tokens)) is not None:
            assert slot not in held
            held[slot] = -(-tokens // PAGE_TOKENS)
        pages = [p for s, n in held.items() for p in cache.page_table(torch.tensor([s]))[0, :n].tolist()]
        assert len(pages) == len(set(pages)) == sum(held.values()) <= 6
    for slot in held:
        cache.release(slot)
    assert cache.free_slots == 4 and cache.acquire(6 * PAGE_TOKENS) is not None
