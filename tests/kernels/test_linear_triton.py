"""The Triton kernels of linear layers with few rows, in the interpreter."""

import pytest
import torch
from torch import Tensor

from ssm_dist import kernels
from ssm_dist.kernels import triton_linear, tuning
from ssm_dist.kernels.gluon_linear_form import held_form

pytestmark = pytest.mark.usefixtures("triton_backend")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NARROW, WIDE = [(1, 1), (7, 37), (9, 520)], [(1, 1), (70, 37), (9, 300)]
"""(N, K)."""
TILES = {"BLOCK_N": 16, "BLOCK_K": 32, "AHEAD": 0, "num_warps": 4, "num_stages": 2}


def inputs(tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, a view of something wider, weight and bias."""
    columns, width = shape
    x = torch.randn(tokens, 2 * width + 1).to(dtype)[:, 1 : width + 1]
    return x, torch.randn(shape).to(dtype), torch.randn(columns).to(dtype)


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within what sums of K products in float32 may be off in any order, and one rounding of the result."""
    y = kernels.linear(x, weight, bias)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    bound = (x.shape[1] + 2) * 2.0**-24 * size + torch.finfo(y.dtype).eps * exact.abs()
    assert y.dtype == x.dtype and y.is_contiguous()
    assert ((y.double() - exact).abs() <= bound + torch.finfo(y.dtype).tiny).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 4])
@pytest.mark.parametrize("shape", NARROW, ids=str)
def test_one_to_four_rows_are_multiplied(dtype: torch.dtype, tokens: int, shape: tuple[int, int]) -> None:
    x, weight, bias = inputs(tokens, shape, dtype)
    check(x, weight, bias)
    check(x, weight, None)


@pytest.mark.parametrize("tokens", [2, 3, 4])
def test_few_rows_by_a_large_weight_are_multiplied_by_tensor_cores(tokens: int) -> None:
    """A row alone is not; and what the tensor cores do not multiply in float32, torch does."""
    with tuning.forced("linear_4", {}):
        x, weight, bias = inputs(tokens, WIDE[1], torch.bfloat16)
        assert not triton_linear._by_vector(x, weight) and triton_linear._by_vector(x[:1], weight)
        check(x, weight, bias)
        check(x[:1], weight, None)
        x, weight, bias = inputs(tokens, WIDE[1], torch.float32)
        assert torch.equal(kernels.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize(
    ("tokens", "shape", "vector"),
    [(1, (10240, 2560), True), (1, (65024, 4096), True), (2, (5120, 160), True), (4, (8192, 256), True),
     (2, (10240, 2560), False), (4, (2560, 5120), False), (4, (4096, 8192), False), (5, (2560, 5120), False)],
)  # fmt: skip
def test_which_units_multiply_on_hopper(
    tokens: int, shape: tuple[int, int], vector: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "architecture", lambda device: 90)
    x, weight = torch.empty(tokens, shape[1], device="meta").bfloat16(), torch.empty(shape, device="meta")
    assert triton_linear.served_by(x, weight.bfloat16()) is not None
    assert triton_linear._by_vector(x, weight.bfloat16()) == vector


@pytest.mark.parametrize(
    ("rows", "shape", "ours"),
    [(33, (2560, 5120), True), (64, (192, 5120), True), (64, (4096, 8192), True), (64, (25140, 2560), True),
     (64, (10240, 2560), False), (33, (16384, 4096), False), (64, (2560, 2560), False)],
)  # fmt: skip
def test_who_multiplies_33_to_64_rows_on_hopper(
    rows: int, shape: tuple[int, int], ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "architecture", lambda device: 90)
    x, weight = torch.empty(rows, shape[1], device="meta"), torch.empty(shape, device="meta")
    assert (triton_linear.served_by(x.bfloat16(), weight.bfloat16()) is not None) == ours


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [5, 17, 64])
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_up_to_64_rows_are_multiplied(dtype: torch.dtype, tokens: int, shape: tuple[int, int]) -> None:
    x, weight, bias = inputs(tokens, shape, dtype)
    check(x, weight, bias)
    check(x, weight, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (4, 1), (1, 2), (3, 3), (6, 2)])
def test_heads_are_projected(
    tokens: int, heads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a weight stored by its outputs, heads of few rows at once; and by one stored by its inputs."""
    x, weight, _ = inputs(tokens, (5, 7 * heads), dtype)
    at_once, calls = triton_linear._few_rows_by_head, []
    monkeypatch.setattr(
        triton_linear, "_few_rows_by_head", lambda *given: calls.append(given) or at_once(*given)
    )
    y = kernels.project_heads(x, weight.T, heads)
    assert len(calls) == (heads > 1 and tokens <= 4)
    by_head = x.double().unflatten(1, (heads, -1)), weight.T.double().unflatten(0, (heads, -1))
    exact = torch.einsum("tgc,gcr->tgr", *by_head)
    size = torch.einsum("tgc,gcr->tgr", *(t.abs() for t in by_head))
    bound = 10 * 2.0**-24 * size + torch.finfo(dtype).eps * exact.abs()
    assert y.shape == (tokens, heads, 5) and y.dtype == dtype
    assert ((y.double() - exact).abs() <= bound).all()
    y = kernels.project_heads(x, weight.T.contiguous(), heads)
    assert ((y.double() - exact).abs() <= bound).all()
    assert len(calls) == (heads > 1 and tokens <= 4)


@pytest.mark.parametrize("programs", [1, 6, 10, 1000])
def test_programs_that_share_a_sum_count_to_zero_again(programs: int) -> None:
    x, weight, bias = inputs(6, (36, 300), torch.bfloat16)
    with tuning.forced(triton_linear.matrix_op(6, weight), {**TILES, "PROGRAMS": programs}):
        first = kernels.linear(x, weight, bias)
        check(x, weight, bias)
        assert torch.equal(kernels.linear(x, weight, bias), first)


@pytest.mark.parametrize(("tokens", "programs"), [(17, 1), (40, 1000), (64, 30)])
def test_rows_dealt_out_in_blocks(tokens: int, programs: int) -> None:
    x, weight, bias = inputs(tokens, (40, 300), torch.bfloat16)
    config = {**TILES, "BLOCK_T": 16, "PROGRAMS": programs}
    with tuning.forced(triton_linear.matrix_op(tokens, weight), config):
        check(x, weight, bias)


@pytest.mark.parametrize(("tokens", "dtype"), [(0, torch.bfloat16), (5, torch.float32), (65, torch.bfloat16)])
def test_other_numbers_of_rows_are_left_to_torch(tokens: int, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(tokens, (5, 7), dtype)
    assert torch.equal(kernels.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


def test_nan_stays_in_its_row() -> None:
    for tokens in (3, 6):
        x, weight, bias = inputs(tokens, (7, 37), torch.bfloat16)
        x[1] = torch.nan
        y = kernels.linear(x, weight, bias)
        others = [t for t in range(tokens) if t != 1]
        assert y[1].isnan().all() and not y[others].isnan().any()


@pytest.mark.parametrize(
    ("rows", "columns", "width", "shares"),
    [(5, 192, 5120, 8), (16, 192, 2560, 8), (64, 192, 5120, 4), (16, 288, 8192, 8), (64, 288, 4096, 5)],
)
def test_small_weights_are_held_before_x_is_there(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, width: int, shares: int
) -> None:
    """x_proj of Mamba and Falcon-Mamba, whole and halved, on Hopper; a warp holds ten steps at most."""
    monkeypatch.setattr(tuning, "architecture", lambda device: 90)
    x, weight = torch.empty(rows, width).bfloat16(), torch.empty(columns, width).bfloat16()
    assert held_form(x, weight) == {"SHARES": shares, "num_warps": 4}
    assert -(-width // shares) <= 10 * 32 * 4
    assert not held_form(x.float(), weight.float()), "only 16-bit numbers"
    assert not held_form(x[:, : width - 4], weight[:, : width - 4]), "only whole 16 bytes"
    assert not held_form(x, torch.empty(10240, width).bfloat16()), "larger weights are slower so"


@pytest.mark.parametrize("matrix", [{}, TILES | {"PROGRAMS": 4}], ids=["torch", "tensor cores"])
def test_another_kernel_serves_where_the_weight_cannot_be_held(matrix: tuning.Configuration) -> None:
    """Compiled as one graph, too: what is asked while compiling needs no addresses."""
    x, weight, bias = torch.randn(6, 64).bfloat16(), torch.randn(9, 64).bfloat16(), torch.randn(9).bfloat16()
    held: tuning.Configuration = {"PROGRAMS": 4, "num_warps": 4}
    with tuning.forced("linear_16_held", held), tuning.forced(triton_linear.matrix_op(6, weight), matrix):
        assert triton_linear.served_by(x, weight) == "held"
        check(x, weight, bias)
        compiled = torch.compile(triton_linear.linear, fullgraph=True, dynamic=True, backend="eager")
        assert torch.equal(compiled(x, weight, bias), kernels.linear(x, weight, bias))
