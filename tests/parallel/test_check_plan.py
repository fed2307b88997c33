"""What no shape reveals: check_plan runs a small model whole and sharded, and says where they part."""

import pytest
import torch
from torch import Tensor, nn

from ssm_dist.errors import UserError
from ssm_dist.parallel import (
    Adjusted,
    Blocks,
    ChannelConv,
    Colwise,
    PackedBlocks,
    PackedPairs,
    Plan,
    Replicated,
    RowwiseReduce,
    Sharded,
    Style,
    TensorParallel,
    check_plan,
    plan_for,
)
from ssm_dist.parallel.collectives import tp_all_reduce
from ssm_dist.parallel.simulated import on_simulated_ranks
from tests.parallel.foreign_models import build
from tests.parallel.toys import MambaLMHeadModel, Packed

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))


def on_x(model: nn.Module) -> Tensor:
    output: Tensor = model(X)
    return output


def packed(style: Style) -> Plan:
    return {"into": style, "out": RowwiseReduce()}


def complaint(factory: object, plan: Plan, degree: int = 2, run: object = None) -> str:
    with pytest.raises(UserError) as error:
        check_plan(factory, plan, degree, run)  # type: ignore[arg-type]
    return str(error.value)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize("pairs", [False, True], ids=["blocks", "pairs"])
def test_a_right_plan_passes(pairs: bool, degree: int) -> None:
    check_plan(lambda: Packed(pairs), packed(PackedPairs() if pairs else PackedBlocks()), degree, on_x)


@pytest.mark.parametrize(
    ("pairs", "style"),
    [(False, Colwise()), (False, PackedPairs()), (True, PackedBlocks())],
    ids=["blocks-as-rows", "blocks-as-pairs", "pairs-as-blocks"],
)
def test_the_wrong_packing_is_caught(pairs: bool, style: Style) -> None:
    said = complaint(lambda: Packed(pairs), packed(style), run=on_x)
    assert "differs from the whole model by" in said
    assert "first output that differs is that of out; the last that agrees is that of the input" in said
    assert "Between them ran into." in said


@pytest.mark.parametrize(
    ("name", "pattern", "style", "where"),
    [
        ("mamba", "backbone.layers.*.mixer.in_proj", Colwise(), "backbone.layers.0.mixer.in_proj"),
        ("zamba", "model.layers.*.mamba.in_proj", PackedBlocks(), "model.layers.0.mamba.in_proj"),
    ],
    ids=["mamba-as-rows", "zamba-as-blocks"],
)
def test_the_wrong_packing_of_transformers_models_is_caught(
    name: str, pattern: str, style: Style, where: str
) -> None:
    said = complaint(lambda: build(name), plan_for(build(name)) | {pattern: style})
    assert f"Between them ran {where}" in said


def test_a_sum_that_nobody_reduces_is_caught() -> None:
    said = complaint(lambda: Packed(False), {"into": PackedBlocks(), "out": Sharded({"weight": 1})}, run=on_x)
    assert "first output that differs is that of out" in said


def test_a_model_that_does_not_run_sharded_says_at_which_degree() -> None:
    said = complaint(lambda: Packed(False), {"into": PackedBlocks(), "out": Replicated()}, 3, on_x)
    assert "does not run when sharded over 3 ranks: RuntimeError: " in said


def test_a_model_that_does_not_run_whole_is_not_blamed_on_the_plan() -> None:
    said = complaint(lambda: build("jamba-no-attention"), plan_for(build("jamba-no-attention")))
    assert "does not run whole, before any plan: " in said and "pass run=" in said


def test_a_model_without_an_embedding_needs_a_run() -> None:
    said = complaint(lambda: Packed(False), packed(PackedBlocks()))
    assert said.startswith("the model does not run whole, before any plan: it has no nn.Embedding to draw ")
    assert "pass run=" in said


def test_an_error_that_says_nothing_is_named_by_its_type() -> None:
    def run(model: nn.Module) -> Tensor:
        raise NotImplementedError

    said = complaint(lambda: Packed(False), packed(PackedBlocks()), run=run)
    assert "does not run whole, before any plan: NotImplementedError; pass run=" in said


@pytest.mark.parametrize("degree", [0, -1])
def test_a_degree_without_ranks_does_not_pass(degree: int) -> None:
    said = complaint(lambda: Packed(False), packed(PackedBlocks()), degree, on_x)
    assert said == f"degree = {degree}: must be an integer of at least 1"


def test_a_plan_with_a_value_that_is_no_style_is_not_run() -> None:
    said = complaint(lambda: Packed(False), {"into": "colwise", "out": RowwiseReduce()}, run=on_x)  # type: ignore[dict-item]
    assert "the value of pattern 'into' must be a style, such as Replicated(), and is 'colwise'" in said


def test_rows_that_are_no_blocks_are_refused() -> None:
    said = complaint(lambda: Packed(False), packed(PackedBlocks(5)), run=on_x)
    assert "into.weight dimension 0 has 24 entries, which is not 5 blocks" in said


@pytest.mark.parametrize("mlp", [0, 20])
@pytest.mark.parametrize("degree", [2, 4])
def test_mamba_ssms_tree_and_sizes(degree: int, mlp: int) -> None:
    """A stand-in with mamba-ssm's tree; its own class needs a GPU."""
    check_plan(lambda: MambaLMHeadModel(mlp=mlp), degree=degree)


def test_mamba_ssms_fused_path_would_be_caught() -> None:
    mixer = Adjusted({"A_log": 0, "D": 0}, divided=("d_inner", "d_model"))
    said = complaint(MambaLMHeadModel, plan_for(MambaLMHeadModel()) | {"backbone.layers.*.mixer": mixer})
    assert "backbone.layers.0.mixer" in said


def test_three_blocks_and_a_convolution_under_one_plan() -> None:
    class Attention(nn.Module):
        """q, k, v packed in one weight, and a causal convolution over them as in hybrid models."""

        def __init__(self) -> None:
            super().__init__()
            self.heads = 4
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
            self.conv = nn.Conv1d(8, 8, 3, groups=8, padding=2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            v = self.conv(v.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
            attended = nn.functional.scaled_dot_product_attention(q, k, v)
            output: Tensor = self.out(attended.transpose(1, 2).flatten(2))
            return output

    plan: Plan = {
        "": Adjusted(divided=("heads",)),
        "qkv": Adjusted({"weight": Blocks(0, 3), "bias": Blocks(0, 3)}),
        "conv": ChannelConv(),
        "out": RowwiseReduce(),
    }
    x = torch.randn(2, 7, 8)
    for degree in (2, 4):
        check_plan(Attention, plan, degree, lambda model: model(x))


def test_the_first_error_of_a_simulated_rank_ends_the_others() -> None:
    def fail(tp: TensorParallel) -> Tensor:
        if tp.rank == 1:
            raise KeyError("mine")
        return tp_all_reduce(torch.ones(2), tp.group)

    with pytest.raises(KeyError, match="mine"):
        on_simulated_ranks(3, fail)


def test_simulated_subgroups_sum_over_neighbours() -> None:
    def total(tp: TensorParallel) -> float:
        return tp_all_reduce(torch.tensor([float(tp.rank)]), tp.subgroup(2)).item()

    assert on_simulated_ranks(4, total) == [1.0, 1.0, 5.0, 5.0]


def test_the_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    check_plan(lambda: Packed(False), packed(PackedBlocks()), run=on_x)
    assert torch.equal(torch.rand(1), expected)
