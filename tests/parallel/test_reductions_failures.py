"""A rank that stalls or dies ends a reduction with its name, in time."""

import multiprocessing
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from ssm_dist.parallel.collectives import RankFailure, failures, shared
from ssm_dist.parallel.collectives.groups import register_lone_rank
from tests.parallel.reductions_on_ranks import (
    shared_where_it_cannot_be,
    slow_reduction,
    until_one_dies,
    without_a_rank,
)
from tests.ranks import RankError, run_on_ranks


def test_a_rank_that_stalls_is_named_with_the_op_within_the_timeout() -> None:
    run_on_ranks(3, time.time)
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_on_ranks(3, without_a_rank, 1, 2.0)
    assert time.monotonic() - start < 15.0
    message = next(line for line in str(caught.value).splitlines() if "RankFailure: " in line)
    assert "all-reduce of (2, 64) float32 (reduction 1 of group 'impatient') did not end on rank" in message
    assert "nothing for 2 s. Missing: rank 1 of 3" in message and "timeout_seconds" in message


def test_a_wait_that_ended_is_nobodys_excuse_later() -> None:
    """Rank 0 waited for more than a second, said so, and took it back."""
    assert run_on_ranks(2, slow_reduction) == [("-1", "never")] * 2


def test_where_memory_cannot_be_shared_the_process_group_serves_and_a_line_says_why() -> None:
    for opened, logged, carried, total in run_on_ranks(2, shared_where_it_cannot_be):
        assert not opened and carried == "gloo" and total.tolist() == [2.0, 2.0, 2.0]
        assert len(logged) == 1
        assert logged[0].startswith("reductions: gloo serves all of them, since memory cannot be shared")


def test_memory_that_a_longer_message_outgrows_stays_for_steps_captured_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group, cpu = register_lone_rank("growing", 2), torch.device("cpu")
    monkeypatch.setattr(shared, "_reason_against", lambda *_: None)
    monkeypatch.setattr(shared, "rendezvous", lambda *_: ((mock.Mock(buffer_ptrs=[0, 0]), None), None))
    monkeypatch.setattr(failures, "_say", lambda *_, **__: None)
    monkeypatch.setattr(failures, "_failure", lambda _, reason: RankFailure(reason))
    for message_bytes in (2**16, 2**16, 2**22):
        assert shared.open_shared_memory(group.name, 4096, message_bytes, cpu)
    (small,) = group.outgrown
    assert group.memory is not None and group.memory.bulk.capacity > small.bulk.capacity
    failures.wait_for_event(group.name, mock.Mock(query=lambda: True))
    small.error.fill_(64 + 1)
    with pytest.raises(RankFailure, match="one_shot over shared memory got nothing from rank 1"):
        failures.wait_for_event(group.name, mock.Mock(query=lambda: True))


def test_a_rank_that_dies_is_named_long_before_the_timeout(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=until_one_dies, args=(rank, 3, 1, tmp_path)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(50.0)
    assert [process.exitcode for process in ranks] == [0, 9, 0]
    for rank in (0, 2):
        assert "Missing: rank 1 of 3" in (tmp_path / f"{rank}.txt").read_text()
