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
    raw = PRESETS["falcon-mamba-7b"][1].to_huggingface() | {"expand": 16}
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
        ("mamba-tiny", {"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
        ("zamba-tiny", {"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
        ("zamba-tiny", {"hidden_mamba_act": "gelu"}, "hidden_mamba_act = 'gelu' is not supported"),
    ],
)
def test_an_activation_that_the_kernels_do_not_fuse_is_refused(
    name: str, change: dict[str, Any], message: str
) -> None:
    config = PRESETS[name][1]
    with pytest.raises(UserError, match=message):
        type(config).from_huggingface(config.to_huggingface() | change)


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
