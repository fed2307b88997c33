"""transformers' folder -> our shards -> a folder -> transformers: the same numbers at every degree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ssm_dist.errors import UserError
from tests.checkpoint.ours import load_and_save, load_ours, our_logits, whole_parameters
from tests.oracle import SIZES, logits, random_model
from tests.ranks import run_on_ranks

TOKENS = [5, 1, 96, 4, 4, 50, 0, 33, 7]


@pytest.mark.parametrize("name", SIZES)
def test_a_checkpoint_of_transformers_gives_the_logits_of_transformers(tmp_path: Path, name: str) -> None:
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path)
    found = our_logits(load_ours(tmp_path).model, torch.tensor(TOKENS))
    torch.testing.assert_close(found, logits(theirs, TOKENS), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("name", SIZES)
def test_shards_join_to_what_one_process_reads(tmp_path: Path, name: str, degree: int) -> None:
    random_model(name).save_pretrained(tmp_path)
    alone = load_ours(tmp_path).parameters
    for parameters in run_on_ranks(degree, whole_parameters, tmp_path):
        assert parameters.keys() == alone.keys()
        for path, parameter in parameters.items():
            rows = len(alone[path])  # beyond them, the vocabulary is padded
            assert torch.equal(parameter[:rows], alone[path])
            assert not parameter[rows:].any()


@pytest.mark.parametrize("localised", [True, False])
@pytest.mark.parametrize("name", SIZES)
def test_transformers_loads_what_ranks_saved_with_the_same_logits(
    tmp_path: Path, name: str, localised: bool
) -> None:
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    run_on_ranks(2, load_and_save, tmp_path / "theirs", tmp_path / "ours", localised)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(again.eval(), TOKENS), logits(theirs, TOKENS))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_saved_model_is_the_same_tensors_as_transformers_saves(tmp_path: Path) -> None:
    random_model("zamba").save_pretrained(tmp_path / "theirs")
    load_ours(tmp_path / "theirs").save(tmp_path / "ours", tokenizer_source=tmp_path / "theirs")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert json.loads((tmp_path / "ours/config.json").read_text())["dtype"] == "float32"
    assert (tmp_path / "ours/generation_config.json").exists()


def test_saving_refuses_a_folder_with_something_in_it(tmp_path: Path) -> None:
    random_model("mamba").save_pretrained(tmp_path)
    ours = load_ours(tmp_path)
    with pytest.raises(UserError, match="not an empty folder"):
        ours.save(tmp_path)


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    random_model("mamba").save_pretrained(tmp_path / "theirs")
    ours = load_ours(tmp_path / "theirs")
    ours.config["not JSON"] = object()
    with pytest.raises(TypeError):
        ours.save(tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_tied_weights_stay_one_parameter(tmp_path: Path) -> None:
    random_model("mamba").save_pretrained(tmp_path)
    model = load_ours(tmp_path).model
    assert model.head.weight is model.embedding.weight


def test_a_model_in_bfloat16_keeps_the_recurrence_in_float32(tmp_path: Path) -> None:
    random_model("mamba").save_pretrained(tmp_path)
    ours = load_ours(tmp_path, dtype=torch.bfloat16)
    wide = {path for path, p in ours.parameters.items() if p.dtype == torch.float32}
    assert wide == {f"layers.{i}.mixer.{name}" for i in range(3) for name in ("A_log", "D", "dt_proj.bias")}


def spelled_anew(folder: Path, rename: Any) -> None:
    """Rewrite a folder's tensors under the names that `rename` gives, a list for each."""
    tensors = load_file(folder / "model.safetensors")
    renamed = {new: tensor.clone() for name, tensor in tensors.items() for new in rename(name)}
    save_file(renamed, folder / "model.safetensors")


SPELLINGS: dict[str, tuple[str, Any]] = {
    "state-spaces": ("mamba", lambda name: [name.replace("embeddings", "embedding")]),
    "bare model": ("mamba", lambda name: [name.removeprefix("backbone.")]),
    "head besides a tie": (
        "mamba",
        lambda name: [name, "lm_head.weight"] if name == "backbone.embeddings.weight" else [name],
    ),
    "head in place of the embedding": (
        "mamba",
        lambda name: [name.replace("backbone.embeddings", "lm_head")],
    ),
    "shared block under a later layer": (
        "zamba",
        lambda name: [name.replace("layers.2.shared", "layers.4.shared")],
    ),
    "shared block under every layer": (
        "zamba",
        lambda name: [name, *([name.replace("layers.2.", "layers.4.")] if "shared" in name else [])],
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_of_the_same_weights_load(tmp_path: Path, spelling: str) -> None:
    model_type, rename = SPELLINGS[spelling]
    random_model(model_type).save_pretrained(tmp_path)
    expected = load_ours(tmp_path).parameters
    spelled_anew(tmp_path, rename)
    found = load_ours(tmp_path).parameters
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[path], found[path]) for path in expected)


@pytest.mark.parametrize(
    ("model_type", "first", "second"),
    [
        ("mamba", "backbone.embeddings.weight", "lm_head.weight"),
        (
            "zamba",
            "model.layers.2.shared_transf.self_attn.q_proj.weight",
            "model.layers.4.shared_transf.self_attn.q_proj.weight",
        ),
    ],
)
def test_copies_that_differ_are_refused(tmp_path: Path, model_type: str, first: str, second: str) -> None:
    random_model(model_type).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, second: tensors[first] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"{second} and {first}.* different values"):
        load_ours(tmp_path)
