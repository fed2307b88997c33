"""The harness of the multi-process tests: its failures must be seen, and must not spoil the next test."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_on_ranks


def sum_over_ranks(start: int) -> float:
    total = torch.tensor(float(start + dist.get_rank()))
    dist.all_reduce(total)
    return total.item()


def process_id() -> int:
    return os.getpid()


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("the cause")
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def leave_the_group() -> None:
    dist.destroy_process_group()


@pytest.mark.parametrize("n", [1, 2, 4])
def test_results_come_back_by_rank(n: int) -> None:
    assert run_on_ranks(n, sum_over_ranks, 10) == [10.0 * n + n * (n - 1) / 2] * n


def test_workers_serve_more_than_one_call() -> None:
    assert run_on_ranks(2, process_id) == run_on_ranks(2, process_id)


def test_an_exception_of_one_rank_comes_back_while_the_other_waits_for_it() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2.*ValueError: the cause"):
        run_on_ranks(2, raise_on, 1)
    assert run_on_ranks(2, sum_over_ranks, 0) == [1.0, 1.0]


def test_a_dead_rank_is_reported_and_replaced() -> None:
    with pytest.raises(RankError, match="rank 1 of 2:\nended with exit code 7"):
        run_on_ranks(2, die_on, 1)
    assert run_on_ranks(2, sum_over_ranks, 0) == [1.0, 1.0]


def test_a_hung_rank_is_reported_with_its_stack_and_replaced() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2:\ndid not finish.*in hang_on"):
        run_on_ranks(2, hang_on, 1, timeout=2.0)
    assert run_on_ranks(2, sum_over_ranks, 0) == [1.0, 1.0]


def test_a_group_that_was_left_is_joined_again() -> None:
    run_on_ranks(2, leave_the_group)
    assert run_on_ranks(2, sum_over_ranks, 0) == [1.0, 1.0]
