"""Saved states: restored under any degree, refused when they do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ssm_dist import UserError
from ssm_dist.llm import LLM
from tests.engine.checkpoints import save_checkpoint
from tests.engine.on_ranks import HISTORY, load, resume, save
from tests.oracle import greedy, random_model
from tests.ranks import run_on_ranks

NAMES = ["mamba", "falcon_mamba", "zamba"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_checkpoint(name, tmp_path_factory.mktemp(name)) for name in NAMES}


@pytest.fixture(scope="module")
def file(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("states") / "mamba.safetensors"
    load(folders["mamba"]).save_state(path, HISTORY)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_a_state_resumes_where_it_was_saved(name: str, folders: dict[str, Path], tmp_path: Path):
    answer = save(folders[name], tmp_path / "state")
    assert resume(folders[name], tmp_path / "state") == (answer, len(HISTORY) - 1)
    assert answer == greedy(random_model(name), HISTORY, 9)


@pytest.mark.parametrize("name", ["mamba", "zamba"])
def test_saved_under_two_ranks_it_resumes_under_four_and_one(
    name: str, folders: dict[str, Path], tmp_path: Path
):
    answers = run_on_ranks(2, save, folders[name], tmp_path / "state")
    assert run_on_ranks(4, resume, folders[name], tmp_path / "state") == [(answers[0], 40)] * 4
    assert resume(folders[name], tmp_path / "state") == (answers[0], 40)
    save(folders[name], tmp_path / "alone")
    alone, together = load_file(tmp_path / "alone"), load_file(tmp_path / "state")
    for key in alone:
        torch.testing.assert_close(together[key], alone[key], atol=1e-4, rtol=1e-4)


def test_prompts_after_a_state_may_be_text_or_ids(folders: dict[str, Path], file: Path):
    llm = load(folders["mamba"])
    state = llm.load_state(file)
    assert llm.tokenizer is not None
    text, ids = llm.generate(["abc", llm.tokenizer.encode("abc")], after=state)
    assert (
        text.token_ids == ids.token_ids == llm.generate([HISTORY + llm.tokenizer.encode("abc")])[0].token_ids
    )
    with pytest.raises(UserError, match="chat template"):
        llm.generate({"messages": []}, after=state)
    with pytest.raises(UserError, match=r"prompt 1: a prompt is text.*not NoneType"):
        llm.generate(["", None], after=state)


def refuses(llm: LLM, file: Path, says: str) -> None:
    with pytest.raises(UserError, match=says):
        llm.load_state(file)


def test_a_state_that_does_not_fit_is_refused(folders: dict[str, Path], file: Path, tmp_path: Path):
    refuses(load(folders["zamba"]), file, "saved by a Mamba model, and this is a Zamba")
    refuses(
        load(folders["mamba"], state_dtype="bfloat16"), file, r"float32.*bfloat16.*state_dtype = 'float32'"
    )
    halves = LLM.from_pretrained(folders["mamba"], model={"dtype": "bfloat16"})
    refuses(halves, file, r"\[model\] dtype")
    other = random_model("mamba")
    with torch.no_grad():
        other.backbone.layers[1].mixer.D[5] += 1e-3
    other.save_pretrained(tmp_path / "other")
    refuses(load(tmp_path / "other"), file, "other sizes or weights")


def test_a_damaged_file_is_refused(folders: dict[str, Path], file: Path, tmp_path: Path):
    llm, data, damaged = load(folders["mamba"]), file.read_bytes(), tmp_path / "damaged"
    at = data.index(b'"history":"') + len(b'"history":"')
    cases = {
        "truncated": data[:-10],
        "not even a header": data[:5],
        "not a file of `state save`": (folders["mamba"] / "model.safetensors").read_bytes(),
        "token ids": data[:at] + (b"1" if data[at : at + 1] == b"0" else b"0") + data[at + 1 :],
    }
    for says, content in cases.items():
        damaged.write_bytes(content)
        refuses(llm, damaged, says)
    refuses(llm, tmp_path / "none", "cannot read")
    with pytest.raises(UserError, match=r"cannot write .*: there is no folder .*no folder$"):
        llm.save_state(tmp_path / "no folder" / "state", HISTORY)
    assert llm.cache.free_slots == 3
