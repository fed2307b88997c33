"""The push kernels in the interpreter, several ranks in one process, one phase after the other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ssm_dist.kernels import norm
from tests.kernels.playing_ranks import PushRanks

pytestmark = pytest.mark.usefixtures("triton_backend")

each_algorithm = pytest.mark.parametrize("two_shot", [False, True], ids=["one-shot", "two-shot"])
each_size = pytest.mark.parametrize("ranks", [2, 3])
ROUNDING = {torch.float32: 2**-22, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Relative; the interpreter truncates to bfloat16, and a two-shot sum is rounded once more."""


def in_phases(two_shot: bool, ranks: int, call: Callable[[int, int], Any]) -> list[Any]:
    """call(rank, phase) for every rank and phase; what the last phase returns, by rank."""
    for phase in (0, 1) if two_shot else (0,):
        for rank in range(ranks):
            call(rank, phase)
    return [call(rank, 2) for rank in range(ranks)]


def parts_of(ranks: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(ranks, rows, width).to(dtype)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (1, 192), (3, 1024)])
@each_algorithm
@each_size
def test_all_ranks_hold_the_sum(
    ranks: int, two_shot: bool, rows: int, width: int, dtype: torch.dtype
) -> None:
    from ssm_dist.kernels.triton_push import push_sum

    world = PushRanks(ranks, slots=32, slot_bytes=4096)
    parts = parts_of(ranks, rows, width, dtype)
    outputs = in_phases(
        two_shot, ranks, lambda rank, phase: push_sum(parts[rank], world.memories[rank], two_shot, phase)
    )
    expected = parts.double().sum(0)
    for output in outputs:
        assert output.dtype == dtype and torch.equal(output, outputs[0])
    assert_close(outputs[0].double(), expected, rtol=ROUNDING[dtype], atol=ranks * ROUNDING[dtype])
    assert world.empty


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "first"])
@each_algorithm
@each_size
def test_the_norm_of_the_sum_is_its_definition(
    ranks: int, two_shot: bool, with_residual: bool, dtype: torch.dtype
) -> None:
    from ssm_dist.kernels.triton_push import push_sum_add_rms_norm

    world, rows, width = PushRanks(ranks, slots=8, slot_bytes=4096), 5, 72
    parts, weight = parts_of(ranks, rows, width, dtype), torch.randn(width).to(dtype)
    residual = torch.randn(rows, width) if with_residual else None
    outputs = in_phases(
        two_shot, ranks,
        lambda rank, phase: push_sum_add_rms_norm(
            parts[rank], residual, weight, 1e-5, world.memories[rank], two_shot, phase
        ),
    )  # fmt: skip
    y, total = norm.add_rms_norm_reference(parts.float().sum(0), residual, weight, 1e-5)
    for output in outputs:
        assert torch.equal(output[0], outputs[0][0]) and torch.equal(output[1], outputs[0][1])
    rounding = ROUNDING[dtype] if two_shot else 2**-22
    assert_close(outputs[0][1], total, rtol=rounding, atol=ranks * rounding)
    assert_close(outputs[0][0], y, rtol=2 * ROUNDING[dtype], atol=4 * ranks * ROUNDING[dtype])
    assert world.empty


@each_algorithm
def test_eight_ranks(two_shot: bool) -> None:
    from ssm_dist.kernels.triton_push import push_sum

    world, parts = PushRanks(8, slots=8, slot_bytes=4096), parts_of(8, 9, 512, torch.float32)
    outputs = in_phases(
        two_shot, 8, lambda rank, phase: push_sum(parts[rank], world.memories[rank], two_shot, phase)
    )
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert_close(outputs[0], parts.sum(0))


@each_algorithm
def test_slots_serve_call_after_call_of_any_size(two_shot: bool) -> None:
    from ssm_dist.kernels.triton_push import push_sum

    world = PushRanks(3, slots=16, slot_bytes=4096)
    uses = torch.zeros(16, dtype=torch.int32)
    for call, rows in enumerate([1, 12, 1, 1, 5, 12, 3, 1]):
        parts = parts_of(3, rows, 1024, torch.float32)
        outputs = in_phases(
            two_shot and call % 3 > 0, 3,
            lambda rank, phase, parts=parts, two=two_shot and call % 3 > 0: push_sum(
                parts[rank], world.memories[rank], two, phase
            ),
        )  # fmt: skip
        uses[:rows] += 1
        assert all(torch.equal(output, parts[0] + parts[1] + parts[2]) for output in outputs)
        assert world.empty and all(torch.equal(memory.counters, uses) for memory in world.memories)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@each_algorithm
def test_a_word_that_reads_as_empty_is_sent_as_another_nan(two_shot: bool, dtype: torch.dtype) -> None:
    from ssm_dist.kernels.triton_push import push_sum

    world = PushRanks(2, slots=4, slot_bytes=4096)
    parts = torch.zeros(2, 2, 64, dtype=dtype)
    parts.view(torch.int32)[1, 1, 3] = -1
    outputs = in_phases(
        two_shot, 2, lambda rank, phase: push_sum(parts[rank], world.memories[rank], two_shot, phase)
    )
    for output in outputs:
        assert torch.equal(output.isnan(), parts[1].isnan()) and output.isnan().any()
    assert world.empty
