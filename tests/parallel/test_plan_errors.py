"""A plan that does not fit says everything that is wrong, before anything has been touched."""

import re
from dataclasses import replace
from typing import Any

import pytest
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ssm_dist.errors import UserError
from ssm_dist.models.language_model import LanguageModelConfig
from ssm_dist.parallel import (
    Adjusted,
    Plan,
    ReduceAddNorm,
    Replicated,
    Sharded,
    TensorParallel,
    VocabParallelHead,
    apply_plan,
    resolve_plan,
)
from ssm_dist.parallel.plans import MAMBA_PLAN, ZAMBA_PLAN
from ssm_dist.registry import PRESETS, preset
from tests.parallel.on_ranks import meta_model

MAMBA, ZAMBA = PRESETS["mamba-tiny"][1], PRESETS["zamba-tiny"][1]
MODEL_TYPES = {type(MAMBA): "mamba", type(ZAMBA): "zamba"}


def message(config: LanguageModelConfig, plan: Plan, degree: int = 2) -> str:
    with pytest.raises(UserError) as error:
        resolve_plan(meta_model(MODEL_TYPES[type(config)], config), plan, degree)
    return str(error.value)


def without(plan: Plan, pattern: str) -> Plan:
    return {key: style for key, style in plan.items() if key != pattern}


def test_a_parameter_that_no_pattern_covers_is_named() -> None:
    said = message(MAMBA, without(MAMBA_PLAN, "layers.*.mixer"))
    for path in ("layers.0.mixer.A_log", "layers.0.mixer.D", "layers.1.mixer.A_log", "layers.1.mixer.D"):
        assert f"no pattern covers parameter {path}\n" in said + "\n"


def test_a_pattern_that_matches_nothing_is_named() -> None:
    assert "pattern 'layers.*.mlp' matches no module" in message(
        MAMBA, MAMBA_PLAN | {"layers.*.mlp": Replicated()}
    )


def test_a_star_stands_for_one_segment_and_a_dot_for_itself() -> None:
    said = message(
        MAMBA, MAMBA_PLAN | {"layers.*": ReduceAddNorm(), "layersX0": Replicated(), "*.norm": Replicated()}
    )
    assert "pattern 'layersX0' matches no module" in said
    assert "pattern '*.norm' matches no module" in said


def test_a_module_covered_twice_is_named_with_the_second_pattern() -> None:
    said = message(MAMBA, MAMBA_PLAN | {"layers.1.norm": Replicated()})
    assert "module layers.1.norm is covered twice, again by 'layers.1.norm'" in said


def test_a_style_for_a_parameter_that_the_module_lacks_is_refused() -> None:
    said = message(MAMBA, MAMBA_PLAN | {"layers.*.mixer": Sharded({"A_log": 0, "D": 0, "dt_bias": 0})})
    assert "'layers.*.mixer' splits 'dt_bias', which layers.0.mixer lacks" in said


def test_a_dimension_that_a_parameter_lacks_is_refused() -> None:
    said = message(MAMBA, MAMBA_PLAN | {"layers.*.mixer": Sharded({"A_log": 2, "D": 0})})
    assert "layers.0.mixer.A_log has 2 dimensions, none numbered 2" in said


def test_tied_parameters_must_be_split_alike() -> None:
    said = message(MAMBA, MAMBA_PLAN | {"head": Replicated()})
    assert "embedding.weight and head.weight are tied but split differently" in said


def test_everything_that_is_wrong_is_said_at_once() -> None:
    plan = without(MAMBA_PLAN, "final_norm") | {"mlp": Replicated(), "layers.0.norm": Replicated()}
    said = message(MAMBA, plan)
    assert len(said.splitlines()) == 4
    for part in ("parameter final_norm.weight", "pattern 'mlp'", "module layers.0.norm is covered twice"):
        assert part in said


@pytest.mark.parametrize(
    ("config", "degree", "reason", "working"),
    [
        (
            replace(MAMBA, vocab_padded=501), 3,
            "dimension 0 of layers.0.mixer.A_log has 128 entries", "1, 2, 4, 8, 16, 32, 64, 128",
        ),
        (
            replace(MAMBA, d_inner=90, vocab_padded=504), 4,
            "dimension 0 of layers.0.mixer.A_log has 90 entries", "1, 2, 3, 5, 6, 9, 10, 15, 18, 30, 45, 90",
        ),
        (
            replace(ZAMBA, vocab_padded=32000), 8,
            "dimension 0 of shared.attention.q_proj.weight has 4 entries", "1, 2, 4",
        ),
        (
            replace(ZAMBA, d_inner=96, d_mlp=96, attention_heads=6, vocab_padded=32001), 3,
            "layers.0.mixer.x_proj has 2 heads, which ranks cannot share evenly", "1, 2, 6",
        ),
        (MAMBA, 3, "dimension 0 of embedding.weight has 500 entries", "1, 2, 4, 8, 16, 32, 64, 128"),
    ],
    ids=["channels", "odd-channels", "attention-heads", "mamba-heads", "vocabulary"],
)  # fmt: skip
def test_a_degree_that_does_not_fit_names_the_parameter_and_the_degrees_that_do(
    config: LanguageModelConfig, degree: int, reason: str, working: str
) -> None:
    said = message(config, MAMBA_PLAN if type(config) is type(MAMBA) else ZAMBA_PLAN, degree)
    assert said == f"degree {degree} does not divide the model: {reason}; degrees that work: {working}"


def test_where_nothing_split_bounds_the_degrees_the_message_says_how_far_it_looked() -> None:
    class Heads(nn.Module):
        count = 66

    plan: Plan = {"": Adjusted(divisible=("count",))}
    with pytest.raises(UserError) as error:
        resolve_plan(Heads(), plan, 4)
    assert str(error.value).endswith("count = 66; degrees up to 64 that work: 1, 2, 3, 6, 11, 22, 33")


@pytest.mark.parametrize("degree", [0, -1, True, 2.0, "2"])
def test_a_degree_that_is_no_number_of_ranks_is_refused(degree: Any) -> None:
    assert message(MAMBA, MAMBA_PLAN, degree) == f"degree = {degree!r}: must be an integer of at least 1"


@pytest.mark.parametrize("value", ["colwise", None, Replicated], ids=str)
def test_a_value_that_is_no_style_is_named_with_its_pattern(value: Any) -> None:
    said = message(MAMBA, MAMBA_PLAN | {"layers.*.norm": value, "head": 3})
    wanted = "must be a style, such as Replicated(), and is"
    assert f"the value of pattern 'layers.*.norm' {wanted} {value!r}\n" in said
    assert said.endswith(f"the value of pattern 'head' {wanted} 3")


@pytest.mark.parametrize("name", ["mamba-2.8b", "falcon-mamba-7b", "zamba-7b"])
def test_degrees_that_the_message_proposes_do_work(name: str) -> None:
    spec, config = preset(name)
    config = replace(config, vocab_padded=-(-config.vocab_size // 3) * 3, n_layers=3)
    if name == "zamba-7b":
        config = replace(config, hybrid_layers=(2,))
    model_type = PRESETS[name][0]
    with pytest.raises(UserError) as error:
        resolve_plan(meta_model(model_type, config), spec.plan, 3)
    for degree in map(int, re.findall(r"\d+", str(error.value).rpartition(":")[2])):
        rows = -(-config.vocab_size // degree) * degree
        resolve_plan(meta_model(model_type, replace(config, vocab_padded=rows)), spec.plan, degree)


def test_a_plan_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    model = meta_model("mamba", MAMBA)
    before = dict(model.named_parameters())
    nobody = TensorParallel(mesh=DeviceMesh.__new__(DeviceMesh), rank=0, degree=3, group="")
    with pytest.raises(UserError):
        apply_plan(model, nobody, without(MAMBA_PLAN, "head") | {"heads": VocabParallelHead()})
    after = dict(model.named_parameters())
    assert all(after[path] is parameter for path, parameter in before.items())
    assert not any("forward" in vars(module) for module in model.modules())
