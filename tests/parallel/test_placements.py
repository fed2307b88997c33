"""Where the plans put every parameter of the three models, on paper and on ranks."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from ssm_dist.models.language_model import LanguageModelConfig
from ssm_dist.parallel import ParameterPlacement, resolve_plan
from ssm_dist.registry import PRESETS, preset
from tests.parallel.on_ranks import meta_model, placed_parameters, sent_by_a_forward, tie_survives
from tests.ranks import run_on_ranks

MIXER: dict[str, int | None] = {
    r"layers\.\d+\.norm\.weight": None,
    r"layers\.\d+\.mixer\.in_proj\.(weight|bias)": 1,
    r"layers\.\d+\.mixer\.conv\.(weight|bias)": 0,
    r"layers\.\d+\.mixer\.x_proj\.weight": 0,
    r"layers\.\d+\.mixer\.dt_proj\.(weight|bias)": 0,
    r"layers\.\d+\.mixer\.(A_log|D)": 0,
    r"layers\.\d+\.mixer\.out_proj\.weight": 1,
    r"layers\.\d+\.mixer\.out_proj\.bias": None,
    r"(embedding|head)\.weight": 0,
    r"final_norm\.weight": None,
}
SHARED: dict[str, int | None] = {
    r"shared\.(input|ff)_norm\.weight": None,
    r"shared\.attention\.[qkv]_proj\.weight": 0,
    r"shared\.attention\.o_proj\.weight": 1,
    r"shared\.mlp\.(gate|up)_proj\.weight": 0,
    r"shared\.mlp\.down_proj\.weight": 1,
    r"layers\.\d+\.linear\.weight": None,
}
"""The dimension that each parameter is split along: channels, heads, the vocabulary; None for whole ones."""

MODELS: dict[str, tuple[str, LanguageModelConfig]] = {
    **{name: PRESETS[name] for name in ("mamba-tiny", "falcon-mamba-tiny", "zamba-tiny")},
    "mamba-biases": ("mamba", replace(PRESETS["mamba-tiny"][1], use_bias=True, tied_head=False)),
}
each_model = pytest.mark.parametrize("name", MODELS)
each_degree = pytest.mark.parametrize("degree", [2, 4])


def planned_dim(path: str) -> int | None:
    (dim,) = [dim for pattern, dim in (MIXER | SHARED).items() if re.fullmatch(pattern, path)]
    return dim


def divided(shape: tuple[int, ...], dim: int | None, degree: int) -> tuple[int, ...]:
    return tuple(n // degree if d == dim else n for d, n in enumerate(shape))


@each_degree
@each_model
def test_before_localising_every_parameter_is_a_dtensor_with_its_planned_placement(
    name: str, degree: int
) -> None:
    model_type, config = MODELS[name]
    shapes = {path: tuple(p.shape) for path, p in meta_model(model_type, config).named_parameters()}
    for parameters in run_on_ranks(degree, placed_parameters, model_type, config):
        assert {path: placed.shape for path, placed in parameters.items()} == shapes
        for path, placed in parameters.items():
            dim = planned_dim(path)
            assert placed.is_dtensor
            assert placed.placement == ("R" if dim is None else f"S({dim})"), path
            assert placed.local_shape == placed.localised == divided(placed.shape, dim, degree)


@each_degree
@pytest.mark.parametrize(
    ("name", "tied"), [("mamba-tiny", True), ("zamba-tiny", True), ("mamba-biases", False)]
)
def test_tied_parameters_stay_one(name: str, tied: bool, degree: int) -> None:
    assert run_on_ranks(degree, tie_survives, *MODELS[name]) == [(tied, tied)] * degree


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["mamba-130m", "mamba-2.8b", "falcon-mamba-7b", "zamba-7b"])
def test_plans_of_released_models_split_nearly_everything(name: str, degree: int) -> None:
    """The share of a rank is its part of the bytes, but for norms and Zamba's small linears."""
    spec, config = preset(name)
    with torch.device("meta"):
        model = spec.build(config)
    placements = resolve_plan(model, spec.plan, degree).parameters
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    kept_whole = sum(p.local_bytes for p in placements if p.dim is None)
    assert sum(p.local_bytes for p in placements) == kept_whole + (whole - kept_whole) // degree
    assert kept_whole < (0.03 if name == "zamba-7b" else 0.001) * whole


def test_a_placement_gives_each_rank_the_next_part() -> None:
    split = ParameterPlacement("p", (2, 12, 5), torch.bfloat16, 1, 4)
    assert [split.slice(rank) for rank in range(4)] == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12)]
    assert (split.local_shape, split.local_bytes) == ((2, 3, 5), 60)
    whole = replace(split, dim=None)
    assert (whole.slice(3), whole.local_shape, whole.local_bytes) == (slice(None), (2, 12, 5), 240)


# --- reductions ---------------------------------------------------------------------------------------------


def x_proj_ranks(name: str, degree: int) -> list[int]:
    """How many ranks reduce after x_proj, by layer; none where nobody does."""
    model_type, config = MODELS[name]
    reductions = resolve_plan(meta_model(model_type, config), preset(name)[0].plan, degree).reductions
    return [reduction.ranks for path, reduction in reductions.items() if path.endswith("x_proj")]


@pytest.mark.parametrize(("degree", "ranks"), [(1, []), (2, []), (4, [2] * 6)])
def test_only_ranks_that_share_one_of_zambas_two_heads_reduce_after_x_proj(
    degree: int, ranks: list[int]
) -> None:
    assert x_proj_ranks("zamba-tiny", degree) == ranks


@pytest.mark.parametrize(("degree", "ranks"), [(1, []), (2, [2, 2]), (4, [4, 4])])
def test_all_ranks_reduce_after_mambas_x_proj(degree: int, ranks: list[int]) -> None:
    assert x_proj_ranks("mamba-tiny", degree) == ranks


def test_one_rank_sends_nothing() -> None:
    for name in ("mamba-tiny", "falcon-mamba-tiny", "zamba-tiny"):
        assert not resolve_plan(meta_model(*MODELS[name]), preset(name)[0].plan, 1).reductions


@each_degree
@pytest.mark.parametrize("name", ["mamba-tiny", "falcon-mamba-tiny"])
def test_a_mamba_forward_reduces_the_embedding_and_twice_a_layer(name: str, degree: int) -> None:
    """x_proj's dt_rank + 2 * d_state numbers a token, and out_proj's d_model; nothing else."""
    sent = run_on_ranks(degree, sent_by_a_forward, *MODELS[name])[0]
    assert sent == [(64, degree), *[(4 + 2 * 16, degree), (64, degree)] * 2]


@each_degree
def test_a_zamba_forward_reduces_once_a_layer_and_twice_more_a_hybrid_one(degree: int) -> None:
    """After the shared attention, and after the linear behind its MLP; x_proj in pairs, at degree 4 alone."""
    sent = run_on_ranks(degree, sent_by_a_forward, *MODELS["zamba-tiny"])[0]
    expected = Counter({(64, degree): 1 + 6 + 2 * 2, (4 + 2 * 16, 2): 6 if degree == 4 else 0})
    assert Counter(sent) == expected
