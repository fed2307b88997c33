"""Reductions: right sums, the same bits on all ranks, fresh tensors, and one opaque node to the compiler."""

import shutil

import pytest
import torch
from torch.testing import assert_close

from ssm_dist.parallel.vocabulary import target_log_probs
from tests.parallel.on_ranks import (
    broadcast,
    check_ops,
    collective,
    compiled_and_eager,
    patience_of_a_later_model,
    rank_tensor,
    shard_log_probs,
    subgroup_sum,
)
from tests.ranks import run_on_ranks

each_degree = pytest.mark.parametrize("degree", [1, 2, 4])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
INDUCTOR = pytest.param(
    "inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
)


@each_dtype
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (0, 4), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("op", ["sum", "max"])
@each_degree
def test_reductions_agree_bit_for_bit_and_leave_their_input(
    degree: int, op: str, shape: tuple[int, ...], strided: bool, dtype: torch.dtype
) -> None:
    everything = torch.stack([rank_tensor(rank, *shape, dtype=dtype) for rank in range(degree)])
    expected = everything.float().sum(0) if op == "sum" else everything.float().amax(0)
    results = run_on_ranks(degree, collective, op, shape, dtype, strided)
    for result in results:
        assert result.output.dtype == dtype
        assert torch.equal(result.output, results[0].output)
        assert torch.equal(result.after, result.before)
        assert result.fresh or not expected.numel()
    assert_close(
        results[0].output.float(),
        expected,
        **({} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}),
    )


@each_dtype
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (0, 4)], ids=str)
@each_degree
def test_gather_puts_columns_side_by_side_in_rank_order(
    degree: int, shape: tuple[int, int], strided: bool, dtype: torch.dtype
) -> None:
    expected = torch.cat([rank_tensor(rank, *shape, dtype=dtype) for rank in range(degree)], dim=1)
    for result in run_on_ranks(degree, collective, "gather", shape, dtype, strided):
        assert torch.equal(result.output, expected)
        assert torch.equal(result.after, result.before)
        assert result.fresh or not expected.numel()


def test_subgroups_are_neighbouring_ranks_and_are_made_once() -> None:
    assert run_on_ranks(4, subgroup_sum, 2) == [(1.0, False), (1.0, False), (5.0, False), (5.0, False)]
    assert run_on_ranks(4, subgroup_sum, 4) == [(6.0, False)] * 4


def test_groups_that_a_first_model_made_wait_as_long_as_the_second_one_says() -> None:
    assert run_on_ranks(4, patience_of_a_later_model) == [[9.0, 9.0, 9.0]] * 4


@pytest.mark.parametrize("degree", [1, 2])
def test_ops_pass_torchs_own_checks(degree: int) -> None:
    run_on_ranks(degree, check_ops)


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_a_compiled_step_is_one_graph_around_its_reductions(backend: str) -> None:
    results = run_on_ranks(2, compiled_and_eager, backend)
    for compiled, eager in results:
        assert_close(compiled, eager)
        assert torch.equal(compiled, results[0][0])


@each_degree
@pytest.mark.parametrize("payload", [b"", b"x", bytes(range(256)) * 9], ids=len)
def test_rank_0s_bytes_arrive_everywhere(degree: int, payload: bytes) -> None:
    assert run_on_ranks(degree, broadcast, payload) == [payload] * degree


# --- log-probabilities over a split vocabulary --------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize(("vocab_size", "padded"), [(97, 100), (8, 8), (5, 8), (1, 4)])
@pytest.mark.parametrize("degree", [None, 1, 2, 4])
def test_target_log_probs_are_those_of_log_softmax_without_the_padding(
    degree: int | None, vocab_size: int, padded: int, scale: float
) -> None:
    """Padding columns hold the largest numbers and NaN, and may be all that a rank has."""
    logits = scale * torch.randn(6, padded)
    logits[:, vocab_size:] = torch.tensor([[torch.nan], [torch.inf]] * 3)
    targets = torch.arange(6) % vocab_size
    expected = torch.log_softmax(logits[:, :vocab_size].double(), dim=1).gather(1, targets[:, None])[:, 0]
    if degree is None:
        results = [target_log_probs(logits, targets, vocab_size, None)]
    else:
        results = run_on_ranks(degree, shard_log_probs, logits, targets, vocab_size)
    for result in results:
        assert result.dtype == torch.float32
        assert torch.equal(result, results[0])
        assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
