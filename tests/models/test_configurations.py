"""Sizes from config.json in its several spellings, and the released sizes of the presets."""

import dataclasses
from typing import Any

import pytest
import torch

from ssm_dist.errors import UserError
from ssm_dist.models.falcon_mamba import FalconMambaConfig
from ssm_dist.models.mamba import MambaConfig
from ssm_dist.models.zamba import ZambaConfig
from ssm_dist.registry import PRESETS, SPECS, preset, spec_for
from tests import oracle

RELEASED = {
    "mamba-130m": 0.129, "mamba-370m": 0.372, "mamba-790m": 0.793, "mamba-1.4b": 1.372, "mamba-2.8b": 2.768,
    "falcon-mamba-7b": 7.273, "zamba-7b": 7.232,
}  # fmt: skip
"""Parameters of the released checkpoints, in billions."""


@pytest.mark.parametrize(("name", "billions"), RELEASED.items())
def test_presets_have_the_released_number_of_parameters(name: str, billions: float) -> None:
    spec, config = preset(name)
    with torch.device("meta"):
        model = spec.build(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 3) == billions


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_survives_its_way_through_config_json(name: str) -> None:
    model_type, config = PRESETS[name]
    raw = config.to_huggingface()
    assert raw["model_type"] == model_type
    assert type(config).from_huggingface(raw) == config


@pytest.mark.parametrize("name", oracle.SIZES)
def test_transformers_reads_the_configuration_that_we_write(name: str) -> None:
    theirs = oracle.random_model(name).config
    ours = spec_for(theirs.model_type).config.from_huggingface(theirs.to_dict())
    assert type(ours).from_huggingface(type(theirs)(**ours.to_huggingface()).to_dict()) == ours


def test_the_original_spelling_of_mamba_pads_its_vocabulary() -> None:
    raw = {"d_model": 2560, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {}, "pad_vocab_size_multiple": 8}
    assert MambaConfig.from_huggingface(raw) == PRESETS["mamba-2.8b"][1]


def test_intermediate_size_is_trusted_over_a_wrong_expand() -> None:
    for expand in (16, None, "q"):
        raw = PRESETS["falcon-mamba-7b"][1].to_huggingface() | {"expand": expand}
        assert FalconMambaConfig.from_huggingface(raw).d_inner == 8192


def test_zambas_period_and_offset_give_the_released_hybrid_layers() -> None:
    listed = PRESETS["zamba-7b"][1].to_huggingface()
    raw = {key: value for key, value in listed.items() if key != "layers_block_type"}
    expected = (2, 7, 13, 19, 25, 31, 37, 43, 49, 55, 61, 67, 73)
    assert ZambaConfig.from_huggingface(raw).hybrid_layers == expected
    assert ZambaConfig.from_huggingface(listed).hybrid_layers == expected


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mamba-tiny", {"hidden_act": "relu"}, 'hidden_act = "relu": must be "silu", the only one'),
        ("zamba-tiny", {"hidden_act": "relu"}, 'hidden_act = "relu": must be "gelu", the only one'),
        ("zamba-tiny", {"hidden_mamba_act": "gelu"}, 'hidden_mamba_act = "gelu": must be "silu", the only'),
    ],
)
def test_an_activation_that_the_kernels_do_not_fuse_is_refused(
    name: str, change: dict[str, Any], message: str
) -> None:
    config = PRESETS[name][1]
    with pytest.raises(UserError, match=message):
        type(config).from_huggingface(config.to_huggingface() | change)


SIZE = "an integer from 1 to 1048576"
NO_SIZES: list[tuple[Any, str]] = [
    ("128", '"128"'), (None, "null"), (True, "true"), (64.0, "64.0"), ([64], "[64]"), (0, "0"), (-3, "-3"),
    (1 << 21, "2097152"),
]  # fmt: skip
"""Values and their spelling in a message."""


def refusal(name: str, change: dict[str, Any], drop: tuple[str, ...] = ()) -> str:
    """What is said of a preset's config.json with some values changed and some dropped."""
    config = PRESETS[name][1]
    raw = {key: value for key, value in config.to_huggingface().items() if key not in drop}
    with pytest.raises(UserError) as error:
        type(config).from_huggingface(raw | change)
    return str(error.value)


@pytest.mark.parametrize(("value", "shown"), NO_SIZES, ids=[shown for _, shown in NO_SIZES])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(("mamba-tiny", key) for key in ("vocab_size", "hidden_size", "num_hidden_layers", "state_size")),
        *(("falcon-mamba-tiny", key) for key in ("intermediate_size", "conv_kernel")),
        *(("zamba-tiny", key) for key in ("hidden_size", "num_hidden_layers", "n_mamba_heads")),
        *(("zamba-tiny", key) for key in ("num_attention_heads", "intermediate_size", "mamba_d_conv")),
    ],
)
def test_a_size_that_is_none_is_refused_with_its_key_and_what_it_must_be(
    name: str, key: str, value: Any, shown: str
) -> None:
    assert refusal(name, {key: value}) == f"config.json: {key} = {shown}: must be {SIZE}"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("mamba-tiny", {"time_step_rank": "foo"}, f'time_step_rank = "foo": must be "auto" or {SIZE}'),
        ("mamba-tiny", {"time_step_rank": False}, f'time_step_rank = false: must be "auto" or {SIZE}'),
        ("zamba-tiny", {"mamba_dt_rank": 0}, f'mamba_dt_rank = 0: must be "auto" or {SIZE}'),
        ("mamba-tiny", {"expand": "q"}, 'expand = "q": must be a number that is from 1 to 1048576 when mult'),
        ("mamba-tiny", {"expand": True}, "expand = true: must be a number"),
        ("mamba-tiny", {"expand": 1e308}, "expand = 1e+308: must be a number"),
        ("mamba-tiny", {"expand": 0.01}, "expand = 0.01: must be a number"),
        ("zamba-tiny", {"mamba_expand": 0}, "mamba_expand = 0: must be a number"),
        ("mamba-tiny", {"layer_norm_epsilon": "x"}, 'layer_norm_epsilon = "x": must be a number from 0 to 1'),
        ("mamba-tiny", {"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon = NaN: must be a number"),
        ("falcon-mamba-tiny", {"mixer_rms_eps": None}, "mixer_rms_eps = null: must be a number from 0 to 1"),
        ("zamba-tiny", {"rms_norm_eps": True}, "rms_norm_eps = true: must be a number from 0 to 1"),
        ("mamba-tiny", {"use_bias": "no"}, 'use_bias = "no": must be true or false'),
        ("zamba-tiny", {"tie_word_embeddings": 0}, "tie_word_embeddings = 0: must be true or false"),
        ("zamba-tiny", {"n_mamba_heads": 3}, "n_mamba_heads = 3: must be a divisor of mamba_expand * hidden"),
        ("zamba-tiny", {"attention_head_dim": 0}, f"attention_head_dim = 0: must be {SIZE}"),
        (
            "zamba-tiny", {"num_attention_heads": 200, "attention_head_dim": None},
            "num_attention_heads = 200: must be at most 2 * hidden_size = 128",
        ),
        (
            "zamba-tiny", {"layers_block_type": "hybrid"},
            'layers_block_type = "hybrid": must be a list of num_hidden_layers = 6 names, some of them "hyb',
        ),
        ("zamba-tiny", {"layers_block_type": ["mamba"] * 6}, ', "mamba"]: must be a list of num_hidden_lay'),
        ("zamba-tiny", {"layers_block_type": ["hybrid"] * 40}, '"hybrid",...: must be a list of num_hidd'),
        ("zamba-tiny", {"num_hidden_layers": 2}, "must be a list of num_hidden_layers = 2 names"),
    ],
    ids=str,
)  # fmt: skip
def test_any_other_value_of_a_wrong_type_or_range_is_refused_alike(
    name: str, change: dict[str, Any], said: str
) -> None:
    # where intermediate_size is there, expand does not count
    message = refusal(name, change, drop=("intermediate_size",) if "expand" in change else ())
    assert message.startswith("config.json: ") and said in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attn_layer_period": 0}, f"attn_layer_period = 0: must be {SIZE}"),
        ({"attn_layer_offset": -1}, "attn_layer_offset = -1: must be an integer from 0 to 1048576"),
        ({"num_hidden_layers": 2}, "num_hidden_layers = 2: must be at least 3 where layers_block_type does"),
    ],
    ids=str,
)
def test_hybrid_layers_that_are_not_listed_need_a_period_an_offset_and_layers(
    change: dict[str, Any], said: str
) -> None:
    assert said in refusal("zamba-tiny", change, drop=("layers_block_type",))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"d_model": "64"}, f'd_model = "64": must be {SIZE}'),
        ({"n_layer": None}, f"n_layer = null: must be {SIZE}"),
        ({"pad_vocab_size_multiple": 0}, f"pad_vocab_size_multiple = 0: must be {SIZE}"),
        ({"ssm_cfg": 3}, "ssm_cfg = 3: must be an object"),
        ({"ssm_cfg": {"layer": 1}}, "ssm_cfg.layer = 1: must be a string"),
        ({"ssm_cfg": {"d_state": "16"}}, f'ssm_cfg.d_state = "16": must be {SIZE}'),
    ],
    ids=str,
)
def test_values_of_the_original_spelling_are_refused_alike(change: dict[str, Any], said: str) -> None:
    raw = {"d_model": 64, "n_layer": 2, "vocab_size": 100, "ssm_cfg": None}
    assert MambaConfig.from_huggingface(raw).d_inner == 128
    with pytest.raises(UserError) as error:
        MambaConfig.from_huggingface(raw | change)
    assert str(error.value) == f"config.json: {said}"


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size"])
def test_a_size_without_a_default_is_missed(key: str) -> None:
    assert refusal("mamba-tiny", {}, drop=(key,)) == f"config.json lacks '{key}'"


def test_what_is_automatic_null_or_a_fraction_is_taken_where_it_has_a_meaning() -> None:
    raw = PRESETS["mamba-tiny"][1].to_huggingface() | {"time_step_rank": "auto", "expand": 1.5}
    assert MambaConfig.from_huggingface(raw).dt_rank == 4
    del raw["intermediate_size"]
    assert MambaConfig.from_huggingface(raw).d_inner == 96
    zamba = PRESETS["zamba-tiny"][1].to_huggingface() | {"attention_head_dim": None}
    assert ZambaConfig.from_huggingface(zamba).attention_head_dim == 32


@pytest.mark.parametrize(
    "extra", [{"ssm_cfg": {"layer": "Mamba2"}}, {"ssm_cfg": {}, "attn_layer_idx": [3]}], ids=str
)
def test_what_the_original_code_trains_besides_mamba_1_is_refused(extra: dict[str, Any]) -> None:
    raw = {"d_model": 64, "n_layer": 2, "vocab_size": 100}
    with pytest.raises(UserError, match="only Mamba-1 is supported"):
        MambaConfig.from_huggingface(raw | extra)


def test_an_unknown_model_type_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="'llama' is not supported; supported: falcon_mamba, mamba, zamba"):
        spec_for("llama")


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="'mamba-3b' does not exist; presets: mamba-130m"):
        preset("mamba-3b")


@pytest.mark.parametrize("model_type", SPECS)
def test_a_padded_vocabulary_only_adds_rows(model_type: str) -> None:
    config = next(config for kind, config in PRESETS.values() if kind == model_type and config.n_layers < 10)
    with torch.device("meta"):
        plain = spec_for(model_type).build(config)
        padded = spec_for(model_type).build(dataclasses.replace(config, vocab_padded=config.vocab_size + 12))
    rows = {"embedding.weight", "head.weight"}
    differing = {
        path
        for (path, a), (_, b) in zip(plain.named_parameters(), padded.named_parameters(), strict=True)
        if a.shape != b.shape
    }
    assert differing <= rows and "embedding.weight" in differing
    assert padded.embedding.weight.shape[0] == config.vocab_size + 12
