"""Linear layers that push their outputs, in the interpreter, several ranks in one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ssm_dist.kernels import linear
from tests.kernels.playing_ranks import PushRanks, words_a_program
from tests.kernels.test_push_triton import ROUNDING

pytestmark = pytest.mark.usefixtures("triton_backend")

TOLERANCE = {"rtol": 2**-20, "atol": 2**-20}
each_dtype = pytest.mark.parametrize("dtype", ROUNDING, ids=str)
each_size = pytest.mark.parametrize("ranks", [2, 3])


def factors(ranks: int, rows: int, columns: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inputs (ranks, rows, width), and weights (ranks, columns, width)."""
    x, weight = torch.randn(ranks, rows, width), torch.randn(ranks, columns, width) / width**0.5
    return x.to(dtype), weight.to(dtype)


@each_dtype
@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 24, 320), (3, 8, 100), (7, 72, 100)])
@each_size
def test_the_sum_has_the_bits_of_a_linear_layer_and_a_push(
    ranks: int, rows: int, columns: int, width: int, dtype: torch.dtype
) -> None:
    from ssm_dist.kernels.triton_push import push_sum
    from ssm_dist.kernels.triton_push_product import product_sum, pushes_product

    world = PushRanks(ranks, slots=32, slot_bytes=4096)
    for _ in range(2):  # both places of a slot
        x, weight = factors(ranks, rows, columns, width, dtype)
        if rows > 4 and dtype == torch.float32:
            assert not pushes_product(x[0], weight[0], world.memories[0], False), "torch multiplies"
            return
        assert all(pushes_product(x[r], weight[r], world.memories[r], False) for r in range(ranks))
        for r in range(ranks):
            product_sum(x[r], weight[r], world.memories[r], 0)
        sums = [product_sum(x[r], weight[r], world.memories[r], 2) for r in range(ranks)]
        assert world.empty and all(torch.equal(total, sums[0]) for total in sums)

        with words_a_program(dtype):
            parts = [linear(x[r], weight[r]) for r in range(ranks)]
        for r in range(ranks):
            push_sum(parts[r], world.memories[r], two_shot=False, phase=0)
        expected = [push_sum(parts[r], world.memories[r], two_shot=False, phase=2) for r in range(ranks)]
        assert torch.equal(sums[0], expected[0])
        exact = torch.einsum("rtk,rnk->tn", x.double(), weight.double())
        assert_close(sums[0].double(), exact, rtol=ROUNDING[dtype], atol=2 * ranks * ROUNDING[dtype])


def test_a_long_message_has_several_units() -> None:
    from ssm_dist.kernels.triton_push import unit_bytes
    from ssm_dist.kernels.triton_push_product import product_sum

    world = PushRanks(2, slots=8, slot_bytes=4096)
    x, weight = factors(2, 4, 264, 16, torch.float32)
    assert unit_bytes(4 * 264 * 4) < 4 * 264 * 4
    for rank in range(2):
        product_sum(x[rank], weight[rank], world.memories[rank], 0)
    exact = torch.einsum("rtk,rnk->tn", x.double(), weight.double())
    for rank in range(2):
        assert_close(product_sum(x[rank], weight[rank], world.memories[rank], 2).double(), exact, **TOLERANCE)
    assert world.empty


@each_dtype
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "first"])
@each_size
def test_the_norm_of_the_sum_has_the_bits_of_a_linear_layer_and_a_push(
    ranks: int, with_residual: bool, dtype: torch.dtype
) -> None:
    from ssm_dist.kernels.triton_push import push_sum_add_rms_norm
    from ssm_dist.kernels.triton_push_product import product_sum_add_rms_norm, pushes_product

    world, rows, columns = PushRanks(ranks, slots=8, slot_bytes=4096), 3, 16
    x, weight = factors(ranks, rows, columns, 96, dtype)
    scale, residual = torch.randn(columns).to(dtype), torch.randn(rows, columns) if with_residual else None
    assert pushes_product(x[0], weight[0], world.memories[0], True)

    def fused(rank: int, phase: int) -> tuple[Tensor, Tensor]:
        memory = world.memories[rank]
        return product_sum_add_rms_norm(x[rank], weight[rank], residual, scale, 1e-5, memory, phase)

    def apart(rank: int, phase: int) -> tuple[Tensor, Tensor]:
        with words_a_program(dtype):
            part = linear(x[rank], weight[rank])
        return push_sum_add_rms_norm(
            part, residual, scale, 1e-5, world.memories[rank], two_shot=False, phase=phase
        )

    seen = list[Tensor]()
    for call in (fused, apart, fused):
        for rank in range(ranks):
            call(rank, 0)
        outputs = [call(rank, 2) for rank in range(ranks)]
        assert world.empty and all(torch.equal(torch.cat(o), torch.cat(outputs[0])) for o in outputs)
        seen.append(torch.cat(outputs[0]))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("rows", [1, 7])
def test_a_rank_that_cannot_push_products_adds_up_with_one_that_does(rows: int) -> None:
    from ssm_dist.kernels.triton_push import push_sum, push_sum_add_rms_norm
    from ssm_dist.kernels.triton_push_product import product_sum, product_sum_add_rms_norm

    world, columns = PushRanks(2, slots=8, slot_bytes=4096), 40
    x, weight = factors(2, rows, columns, 96, torch.bfloat16)
    scale, residual = torch.randn(columns).bfloat16(), torch.randn(rows, columns)
    norm = (residual, scale, 1e-5, world.memories[1], False)
    with words_a_program(torch.bfloat16):
        part = linear(x[1], weight[1])
    product_sum(x[0], weight[0], world.memories[0], 0)
    push_sum(part, world.memories[1], two_shot=False, phase=0)
    sums = product_sum(x[0], weight[0], world.memories[0], 2), push_sum(part, world.memories[1], False, 2)
    assert torch.equal(*sums)
    product_sum_add_rms_norm(x[0], weight[0], residual, scale, 1e-5, world.memories[0], 0)
    push_sum_add_rms_norm(part, *norm, 0)
    mine = product_sum_add_rms_norm(x[0], weight[0], residual, scale, 1e-5, world.memories[0], 2)
    assert torch.equal(torch.cat(mine), torch.cat(push_sum_add_rms_norm(part, *norm, 2)))
    assert_close(mine[1], residual + sums[0], rtol=2**-7, atol=2**-6)
    assert world.empty


def test_nothing_that_looks_empty_is_sent() -> None:
    from ssm_dist.kernels.triton_push_product import product_sum

    world = PushRanks(2, slots=8, slot_bytes=4096)
    x, weight = torch.full((2, 1, 16), torch.nan).bfloat16(), torch.ones(2, 16, 16).bfloat16()
    x.view(torch.int16).fill_(-1)  # NaN with the bits of the empty word
    for rank in range(2):
        product_sum(x[rank], weight[rank], world.memories[rank], 0)
    assert product_sum(x[0], weight[0], world.memories[0], 2).isnan().all()


@pytest.mark.parametrize(
    ("rows", "columns", "width", "with_norm"),
    [(65, 64, 64, False), (1, 60, 64, False), (8, 97, 64, False), (1, 2056, 64, True), (3, 64, 8192, False)],
    ids=["many rows", "no whole 16 bytes", "no whole words", "rows longer than slots", "more than registers"],
)
def test_what_cannot_push_is_known(rows: int, columns: int, width: int, with_norm: bool) -> None:
    from ssm_dist.kernels.triton_push_product import pushes_product

    memory = PushRanks(2, slots=8, slot_bytes=4096).memories[0]
    x, weight = torch.zeros(rows, width).bfloat16(), torch.zeros(columns, width).bfloat16()
    assert not pushes_product(x, weight, memory, with_norm)
    assert pushes_product(x[:1, :64], weight[:8, :64].contiguous(), memory, with_norm)
    assert not pushes_product(x[:1, :64], weight[:8, :64].float(), memory, with_norm)
    assert not pushes_product(x[:1, :64].double(), weight[:8, :64].double(), memory, with_norm)
