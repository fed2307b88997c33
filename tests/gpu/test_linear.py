"""Linear layers with few rows on a GPU, alone and in chains of dependent launches."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_dist import kernels
from ssm_dist.kernels import backend, triton_linear, tuning
from ssm_dist.kernels.gluon_linear_form import held_form
from ssm_dist.kernels.linear import linear_by_head
from tests.kernels.inputs import projected_update_inputs, scan_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or backend.interpreting(), reason="needs a GPU"),
]

ROWS = [1, 2, 3, 4, 5, 8, 16, 17, 32, 33, 64]
SHAPES = [(10240, 2560), (2560, 5120), (192, 5120), (192, 2560), (288, 8192), (288, 4096), (264, 1856),
          (197, 1304), (1280, 160), (3712, 14848), (50280, 2560), (101, 37), (1, 8)]  # fmt: skip
"""(N, K): projections of the released models, and odd ones."""


def bounded(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether y is off no more than sums of K products in float32, in any order, and one rounding may be.

    cuBLAS may round the sum of products once more, before it adds the bias (it does for some single columns).
    """
    wide = [t.double() for t in (x, weight)]
    added = torch.zeros((), dtype=torch.float64) if bias is None else bias.double()
    products = wide[0] @ wide[1].T
    exact = products + added
    rounded = exact.abs()
    if bias is not None and triton_linear.served_by(x, weight) is None:
        rounded = rounded + products.abs()
    size = wide[0].abs() @ wide[1].abs().T + added.abs()
    bound = (x.shape[1] + 2) * 2.0**-24 * size + torch.finfo(y.dtype).eps / 2 * rounded * (1 + 2**-7)
    return bool(((y.double() - exact).abs() <= bound + torch.finfo(y.dtype).tiny).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_few_rows_of_any_number_are_multiplied(shape: tuple[int, int]) -> None:
    with backend.using("triton", "cuda"), torch.device("cuda"):
        weight, bias = torch.randn(shape).bfloat16(), torch.randn(shape[0]).bfloat16()
        torch.cuda.synchronize()  # what kernels may read before they wait has to be there
        for rows in ROWS:
            x = torch.randn(rows, 2 * shape[1]).bfloat16()[:, shape[1] :]
            assert bounded(kernels.linear(x, weight, bias), x, weight, bias), rows
            assert torch.equal(kernels.linear(x, weight), kernels.linear(x, weight)), rows


@pytest.mark.parametrize("rows", [6, 40])
def test_a_weight_is_held_where_it_can_be(rows: int) -> None:
    """Compiled as one graph, too; and where x is at an odd address, which takes another kernel, or a copy."""
    with backend.using("triton", "cuda"), torch.device("cuda"):
        weight, wide = torch.randn(192, 2560).bfloat16(), torch.randn(rows, 2568).bfloat16()
        torch.cuda.synchronize()
        assert held_form(wide[:, :2560], weight)
        compiled = torch.compile(kernels.linear, fullgraph=True, dynamic=True)
        for x in (wide[:, :2560], wide[:, 4:2564]):
            y, again = kernels.linear(x, weight), compiled(x, weight)
            assert bounded(y, x, weight, None) and bounded(again, x, weight, None)
            assert x.data_ptr() % 16 or torch.equal(again, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    with backend.using("triton", "cuda"), torch.device("cuda"):
        weight = torch.randn(640, 1280).to(dtype)
        torch.cuda.synchronize()
        for rows in (1, 4, 9):
            x = torch.randn(rows, 1280).to(dtype)
            if rows <= 4 or dtype != torch.float32:
                assert bounded(kernels.linear(x, weight), x, weight, None)
            else:
                assert torch.equal(kernels.linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("rows", [1, 4, 16, 64])
def test_a_captured_chain_of_layers_equals_the_same_calls_one_by_one(rows: int) -> None:
    """Each starts before the one before it has finished; small ones, so that many are under way at once."""
    with backend.using("triton", "cuda"), torch.device("cuda"):
        wide = [torch.randn(512, 256).bfloat16() / 16 for _ in range(24)]
        back = [torch.randn(256, 512).bfloat16() / 22 for _ in range(24)]
        weights = list(itertools.chain(*zip(wide, back, strict=True)))
        x = torch.randn(rows, 256).bfloat16()

        def chain(finish: bool) -> Tensor:
            y = x
            for weight in weights:
                y = kernels.linear(y, weight)
                if finish:
                    torch.cuda.synchronize()
            return y

        chain(True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = chain(False)
        for _ in range(50):
            x.normal_()
            graph.replay()
            assert torch.equal(captured, chain(True))


@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize(("sequences", "channels", "rank", "groups"), [(1, 5120, 160, 1), (8, 7424, 232, 2)])
def test_projection_and_state_update_in_one(
    sequences: int, channels: int, rank: int, groups: int, eps: float | None
) -> None:
    with backend.using("triton", "cuda"), torch.device("cuda"):
        x, _, A_log, _, _, D, z, bias, state, _, slots = scan_inputs(
            [1] * sequences, channels, 16, groups, torch.bfloat16
        )
        given = torch.randn(sequences, groups, rank + 32).bfloat16()
        weight = (torch.randn(channels, rank) / rank**0.5).bfloat16()
        arguments: list[Any] = [x, given, weight, A_log, D, z, bias, state, slots, eps]
        wide: list[Any] = [t.double() for t in arguments[:-2]] + arguments[-2:]
        torch.cuda.synchronize()
        y = kernels.projected_state_update(*arguments)
        with backend.using("reference", "cuda"):
            exact = kernels.projected_state_update(*wide)
        assert float((y.double() - exact).norm() / exact.norm()) < 3e-3
        assert float((state.double() - wide[7]).norm() / wide[7].norm()) < 1e-5


@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize(
    ("sequences", "channels", "rank", "groups"), [(64, 5120, 160, 1), (43, 7424, 232, 2)]
)
@pytest.mark.parametrize("shape", [(16, 16, 4), (16, 16, 8), (16, 32, 8), (32, 16, 8)], ids=str)
def test_projection_and_state_update_of_many_sequences_in_one(
    shape: tuple[int, int, int], sequences: int, channels: int, rank: int, groups: int, eps: float | None
) -> None:
    """By the tensor cores, whatever the tuning table says; states of slots that are not named stay."""
    config = dict(zip(("SEQUENCES", "BLOCK_D", "num_warps"), shape, strict=True))
    with backend.using("triton", "cuda"), torch.device("cuda"):
        arguments = projected_update_inputs(sequences, channels, rank, groups, torch.bfloat16)
        arguments[8:] = [arguments[9], eps]
        arguments[1] = arguments[1].contiguous()
        wide: list[Any] = [t.double() for t in arguments[:-2]] + arguments[-2:]
        torch.cuda.synchronize()
        with tuning.forced("projected_state_update", config):
            y = kernels.projected_state_update(*arguments)
        with backend.using("reference", "cuda"):
            exact = kernels.projected_state_update(*wide)
        assert float((y.double() - exact).norm() / exact.norm()) < 3e-3
        assert float((arguments[7].double() - wide[7]).norm() / wide[7].norm()) < 1e-5


@pytest.mark.parametrize(
    ("channels", "outputs", "heads"), [(5120, 192, 1), (8192, 288, 1), (7424, 264, 2), (74, 5, 2)]
)
def test_x_proj_by_heads(channels: int, outputs: int, heads: int) -> None:
    with backend.using("triton", "cuda"), torch.device("cuda"):
        weight = (torch.randn(outputs, channels) / channels**0.5).bfloat16().T
        torch.cuda.synchronize()
        for rows in ROWS:
            x = torch.randn(rows, 2 * channels).bfloat16()[:, :channels]
            y = kernels.project_heads(x, weight, heads)
            by_head = x.double().unflatten(1, (heads, -1)), weight.double().unflatten(0, (heads, -1))
            exact = torch.einsum("tgc,gcr->tgr", *by_head)
            assert float((y.double() - exact).norm() / exact.norm()) < 3e-3, rows
            assert torch.equal(kernels.project_heads(x, weight, heads), y), rows


@pytest.mark.parametrize("rows", [1, 64, 3000])
def test_dt_proj_by_heads(rows: int) -> None:
    with backend.using("triton", "cuda"), torch.device("cuda"):
        x, weight = torch.randn(rows, 2, 264).bfloat16()[..., :232], torch.randn(7424, 232).bfloat16()
        y = linear_by_head(x, weight)
        exact = torch.cat([x[:, g].double() @ w.double().T for g, w in enumerate(weight.chunk(2))], 1)
        assert float((y.double() - exact).norm() / exact.norm()) < 3e-3
