"""Requests on their way to other ranks: what arrives is what was sent."""

from __future__ import annotations

import json
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssm_dist.errors import UserError
from ssm_dist.requests import Request, from_bytes, prepare, request_fields, request_of, to_bytes
from ssm_dist.sampling.params import SamplingParams

PARAMS = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, 9),
    temperature=st.floats(0.1, 2),
    seed=st.integers(0, 2**64 - 1),
    stop=st.lists(st.text("äb\n", min_size=1, max_size=3), max_size=2).map(tuple),
)
REQUESTS = st.builds(
    Request, st.integers(0, 2**40), st.none() | st.text(), st.lists(st.integers(0, 2**32 - 1)), PARAMS,
    st.none() | st.text(),
)  # fmt: skip


@given(REQUESTS)
def test_a_request_survives_its_way_as_json(request):
    arrived = request_of(json.loads(json.dumps(request_fields(request))))
    assert arrived == request and arrived.packed == array("I", request.token_ids)


@given(st.lists(REQUESTS, max_size=4))
def test_requests_survive_their_way_as_bytes(requests):
    arrived = from_bytes(to_bytes(requests))
    assert arrived == requests
    assert [r.packed for r in arrived] == [array("I", r.token_ids) for r in requests]


def test_ids_that_the_vocabulary_lacks_are_named() -> None:
    for ids, named in (([3, 50, 4], 50), ([3, -1], -1), ([2**40], 2**40)):
        with pytest.raises(UserError, match=f"token id {named} is out of range.* ids 0 to 49"):
            prepare(ids, SamplingParams(), 0, None, 50)
    assert prepare([0, 49], SamplingParams(), 0, None, 50).packed == array("I", [0, 49])


def test_a_request_keeps_its_tokens_when_the_callers_list_changes() -> None:
    ids = [1, 2]
    request = prepare(ids, SamplingParams(), 0, None, 50)
    ids.append(3)
    assert request.token_ids == [1, 2]
