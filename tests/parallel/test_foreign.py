"""Other people's models under our plans: their own forward and generate, the same as in one process."""

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.testing import assert_close

from ssm_dist.errors import UserError
from ssm_dist.parallel import (
    Adjusted,
    Colwise,
    Plan,
    ResolvedPlan,
    TensorParallel,
    Wire,
    apply_plan,
    check_plan,
    plan_for,
    resolve_plan,
    shard_module,
)
from ssm_dist.parallel.simulated import on_simulated_ranks
from ssm_dist.parallel.styles import Reduction
from tests import oracle
from tests.parallel.foreign_models import build
from tests.parallel.foreign_on_ranks import sharded, sharded_toy
from tests.parallel.toys import Packed
from tests.ranks import run_on_ranks

PROMPT = [96, 3, 3, 50, 7, 8, 1]
GREEDY = 32
CPU = torch.device("cpu")
MIXER = "backbone.layers.*.mixer"


@cache
def expected(name: str) -> tuple[Tensor, list[int]]:
    model = build(name)
    return oracle.logits(model, PROMPT), oracle.greedy(model, PROMPT, GREEDY)


def refusal(model: nn.Module, plan: Plan, degree: int = 2) -> str:
    """What shard_module says; the model must stay as it was."""
    before = dict(model.named_parameters())
    nobody = TensorParallel(mesh=DeviceMesh.__new__(DeviceMesh), rank=0, degree=degree, group="")
    with pytest.raises(UserError) as error:
        shard_module(model, nobody, plan, CPU)
    assert all(before[path] is parameter for path, parameter in model.named_parameters())
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())
    return str(error.value)


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "zamba", "jamba"])
def test_logits_and_32_greedy_tokens_are_those_of_one_process(name: str, degree: int) -> None:
    logits, tokens = expected(name)
    ranks = run_on_ranks(degree, sharded, name, PROMPT, GREEDY)
    for found, written in ranks:
        assert_close(found, logits, rtol=0, atol=1e-4)
        assert written == tokens
        assert torch.equal(found, ranks[0][0])


def test_jamba_without_attention_runs_without_a_cache_as_in_one_process() -> None:
    """With one, transformers' class does not run at all: its cache counts tokens in attention layers."""
    model = build("jamba-no-attention")
    logits, tokens = oracle.logits(model, PROMPT), oracle.greedy(model, PROMPT, GREEDY, cached=False)
    for found, written in run_on_ranks(2, sharded, "jamba-no-attention", PROMPT, GREEDY, False):
        assert_close(found, logits, rtol=0, atol=1e-4)
        assert written == tokens


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("name", ["mamba-biases", "zamba-4heads", "zamba-1head", "jamba-dense"])
def test_other_sizes_and_other_parts(name: str, degree: int) -> None:
    """Biases, no convolution bias, heads that ranks share or not, MLPs in the place of experts."""
    check_plan(lambda: build(name), degree=degree)


def test_grouped_queries_at_the_one_degree_that_they_allow() -> None:
    check_plan(lambda: build("jamba-groups"), degree=2)


def test_the_plan_comes_from_the_class_or_one_that_it_derives_from() -> None:
    class Mine(type(build("mamba"))):  # type: ignore[misc]
        pass

    assert plan_for(Mine(build("mamba").config)) is not None
    with pytest.raises(
        UserError, match=r"no ready plan for torch.nn.modules.linear.Linear.*MambaForCausalLM"
    ):
        plan_for(nn.Linear(1, 1))


def test_a_tree_that_does_not_fit_is_refused_with_the_first_path_that_differs() -> None:
    model = build("mamba")
    model.backbone.layers[1].adapter = nn.Linear(2, 2)
    first = refusal(model, plan_for(model)).splitlines()[1]
    assert first.strip() == "no pattern covers parameter backbone.layers.1.adapter.weight"


def test_a_forgotten_parameter_is_named_when_the_plan_is_applied() -> None:
    model = build("zamba")
    plan = {path: style for path, style in plan_for(model).items() if path != "model.layers.*.mamba"}
    assert "no pattern covers parameter model.layers.0.mamba.x_proj_weight" in refusal(model, plan)


@pytest.mark.parametrize(
    ("dims", "said"),
    [
        (
            {"A_log": 1, "D": 0},
            "splits A_log along 16 entries, which is not intermediate_size",
        ),
        ({"A_log": 2, "D": 0}, "A_log has 2 dimensions, none numbered 2"),
        ({"A_log": 0, "D": 0, "dt": 0}, "splits 'dt', which backbone.layers.0.mixer lacks"),
    ],
)
def test_a_wrong_dimension_is_refused_when_the_plan_is_applied(dims: dict[str, int], said: str) -> None:
    model = build("mamba")
    wrong = plan_for(model) | {MIXER: Adjusted(dict(dims), divided=("intermediate_size",))}
    assert said in refusal(model, wrong)


def test_an_attribute_that_the_module_lacks_is_refused() -> None:
    model = build("mamba")
    wrong = plan_for(model) | {MIXER: Adjusted({"A_log": 0, "D": 0}, divided=("d_inner",))}
    assert "backbone.layers.0.mixer has no 'd_inner', which the plan adjusts" in refusal(model, wrong)


@pytest.mark.parametrize(
    ("name", "degree", "said"),
    [
        ("jamba-groups", 4, "has config.num_key_value_heads = 2; degrees that work: 1, 2"),
        ("zamba", 5, "has n_mamba_heads = 2, which ranks cannot share evenly"),
        ("mamba", 8, "dimension 0 of backbone.layers.0.mixer.A_log has 108 entries"),
    ],
)
def test_degrees_that_do_not_divide_are_refused_with_those_that_do(name: str, degree: int, said: str) -> None:
    model = build(name)
    message = refusal(model, plan_for(model), degree)
    assert "degrees that work: 1, 2" in message
    assert said in message


def test_a_meta_model_becomes_a_meta_shard() -> None:
    with torch.device("meta"):
        model = type(build("zamba"))(build("zamba").config)
    resolved = on_ranks(model, 4)
    assert all(parameter.is_meta for parameter in model.parameters())
    mixer = model.model.layers[0].mamba
    assert mixer.in_proj.weight.shape == (40, 40)  # pairs of 20 of 80 channels
    assert mixer.x_proj_weight.shape == (1, 3 + 16, 20)  # half of a head
    assert model.lm_head.weight is model.model.embed_tokens.weight
    placed = {p.path: p.shape for p in resolved.parameters}
    assert placed["model.layers.0.mamba.in_proj.weight"] == (80, 2, 40)


def on_ranks(model: nn.Module, degree: int) -> ResolvedPlan:
    """The model as rank 0 of a simulation shards it; the other ranks hold nothing."""

    def shard(tp: TensorParallel) -> ResolvedPlan | None:
        return shard_module(model, tp, None, CPU) if tp.rank == 0 else None

    resolved = on_simulated_ranks(degree, shard)[0]
    assert resolved is not None
    return resolved


def test_the_ranks_shards_put_together_are_the_whole() -> None:
    whole, shards = build("mamba").state_dict(), [build("mamba") for _ in range(4)]
    on_simulated_ranks(4, lambda tp: shard_module(shards[tp.rank], tp, None, CPU))
    path = "backbone.layers.1.mixer.in_proj.weight"
    parts = [shard.get_parameter(path) for shard in shards]
    x, z = ([part.chunk(2)[half] for part in parts] for half in (0, 1))
    assert torch.equal(torch.cat(x + z), whole[path])
    words = torch.cat([shard.get_parameter("lm_head.weight") for shard in shards])
    assert torch.equal(words[:97], whole["lm_head.weight"]) and not words[97:].any()


def test_a_shard_may_be_cast_and_copied_without_losing_its_sums() -> None:
    """Zamba's x_proj_weight carries its reduction with it, also where ranks share a head."""
    prompt, whole = torch.tensor([PROMPT]), build("zamba").double()
    shards = [build("zamba") for _ in range(4)]

    def logits(tp: TensorParallel) -> Tensor:
        shard_module(shards[tp.rank], tp, None, CPU)
        found: Tensor = copy.deepcopy(shards[tp.rank]).double()(prompt).logits
        return found

    with torch.inference_mode():
        reference = whole(prompt).logits
    for found in on_simulated_ranks(4, logits):
        assert_close(found, reference, rtol=0, atol=1e-4)


def test_the_plan_says_what_a_forward_sends() -> None:
    model = build("zamba")
    sent = {degree: resolve_plan(model, plan_for(model), degree).reductions for degree in (2, 4)}
    assert sent[4]["model.layers.0.mamba"] == Reduction("all-reduce", 3 + 2 * 8, 2)
    assert sent[2].keys() == sent[4].keys() - {path for path in sent[4] if path.endswith(".mamba")}
    assert sent[2]["model.layers.0.mamba.out_proj"] == Reduction("all-reduce", 40, 2)


def test_nothing_is_left_behind_in_classes_and_configurations() -> None:
    model, later = build("zamba"), build("zamba")
    config, forward = model.config.to_dict(), type(model.model.layers[0].mamba).forward
    on_ranks(model, 4)
    assert model.config.to_dict() == config
    assert type(model.model.layers[0].mamba).forward is forward
    assert torch.equal(oracle.logits(later, PROMPT), expected("zamba")[0])


def test_a_size_read_from_the_configuration_is_divided_in_the_modules_own_copy() -> None:
    class Sized(nn.Module):
        def __init__(self, config: nn.Module) -> None:
            super().__init__()
            self.config, self.weight = config, nn.Parameter(torch.zeros(6, 5))

    shared = type("Config", (), {"width": 6})()
    model = nn.Sequential(Sized(shared), Sized(shared))
    plan: Plan = {"0": Adjusted({"weight": 0}, divided=("config.width",)), "1": Colwise()}
    on_simulated_ranks(2, lambda tp: tp.rank or shard_module(model, tp, plan, CPU))
    assert (model[0].config.width, model[1].config.width, shared.width) == (3, 6, 6)


def test_apply_plan_points_to_shard_module_where_it_cannot_help() -> None:
    model = build("mamba")
    nobody = TensorParallel(mesh=DeviceMesh.__new__(DeviceMesh), rank=0, degree=2, group="")
    with pytest.raises(UserError, match="use shard_module"):
        apply_plan(model, nobody, plan_for(model))
    assert len(resolve_plan(model, plan_for(model), 2).parameters) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("in_the_plan", "for_all"),
    [(Wire("int8", 32), Wire()), (None, Wire("int8", 32))],
    ids=["in-the-plan", "for-all-plans"],
)
def test_the_sum_of_a_row_wise_linear_travels_as_it_is_told(in_the_plan: Wire | None, for_all: Wire) -> None:
    x = torch.randn(9, 64)
    torch.manual_seed(4)
    with torch.inference_mode():
        whole = Packed(pairs=False, width=64, channels=128)(x)
    exact = run_on_ranks(2, sharded_toy, x, Wire(), for_all)[0]
    ranks = run_on_ranks(2, sharded_toy, x, in_the_plan, for_all)
    assert_close(exact, whole, rtol=0, atol=1e-5)
    assert torch.equal(*ranks)
    assert 1e-4 < (ranks[0] - whole).norm() / whole.norm() < 0.02
