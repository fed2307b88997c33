"""What is wrong with a checkpoint is said before anything is allocated: which file, tensor, shape, bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssm_dist.build import open_source
from ssm_dist.checkpoint import hub, open_checkpoint, resolve_dtype
from ssm_dist.config_reading import build_config
from ssm_dist.errors import UserError
from tests.checkpoint.ours import load_ours
from tests.oracle import random_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint without faults."""
    folder = tmp_path_factory.mktemp("whole")
    random_model("mamba").save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


def first_file(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def message_of_loading(folder: Path) -> str:
    with pytest.raises(UserError) as raised:
        load_ours(folder)
    return str(raised.value)


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(first_file(folder))
    change(tensors)
    save_file(tensors, first_file(folder))


def test_a_missing_shard_is_named_and_its_tensors_are_not_called_missing_one_by_one(folder: Path) -> None:
    first_file(folder).unlink()
    message = message_of_loading(folder)
    assert "model-00001-of" in message
    assert "tensors missing" not in message


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_named_with_the_bytes_that_it_should_have(folder: Path, kept: int) -> None:
    file = first_file(folder)
    content = file.read_bytes()
    file.write_bytes(content[:kept])
    message = message_of_loading(folder)
    assert f"{file.name} is truncated" in message
    assert str(len(content[:kept])) in message
    if kept == -1:
        assert str(len(content)) in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\xff" * 8 + b"?" * 80, "not a safetensors file"),
        ((4).to_bytes(8, "little") + b"nope", "malformed header"),
        ((2).to_bytes(8, "little") + b"[]", "malformed header"),
        ((10).to_bytes(8, "little") + b'{"a": "b"}', "malformed header at tensor a"),
    ],
)
def test_a_file_of_something_else_is_named(folder: Path, content: bytes, expected: str) -> None:
    first_file(folder).write_bytes(content)
    assert expected in message_of_loading(folder)


def test_a_header_that_contradicts_itself_is_named(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    first_file(folder).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    assert "a takes 8 bytes, not 4" in message_of_loading(folder)


def test_bytes_after_the_end_are_named(folder: Path) -> None:
    with first_file(folder).open("ab") as stream:
        stream.write(b"more")
    assert "where its header describes" in message_of_loading(folder)


def test_missing_unexpected_and_misshaped_tensors_and_dtypes_come_in_one_message(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        names = sorted(tensors)
        tensors.pop(names[0])
        tensors["a.stranger"] = torch.zeros(3)
        tensors[names[1]] = torch.zeros(3, 5)
        tensors[names[2]] = tensors[names[2]].to(torch.int8)

    names = sorted(load_file(first_file(folder)))
    change_tensors(folder, change)
    message = message_of_loading(folder)
    assert f"1 tensor in the index, but not in the file it names: {names[0]}" in message
    assert "1 tensor unexpected: a.stranger" in message
    assert f"{names[1]} is (3, 5), not (" in message
    assert f"{names[2]} I8" in message
    assert len(message.splitlines()) <= 10


def test_many_missing_tensors_are_counted_and_the_first_few_named(tmp_path: Path) -> None:
    random_model("mamba").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    message = message_of_loading(tmp_path)
    assert "10 tensors missing: backbone.layers.3." in message
    assert "and 6 more" in message


def test_an_own_head_is_required_where_it_is_not_tied(tmp_path: Path) -> None:
    random_model("mamba").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert "1 tensor missing: lm_head.weight" in message_of_loading(tmp_path)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"weight_map": 3}', "weight_map"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "outside its folder"),
    ],
)
def test_a_bad_index_is_named(folder: Path, index: str, expected: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    message = message_of_loading(folder)
    assert "model.safetensors.index.json" in message
    assert expected in message


def test_shards_without_an_index_are_explained(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in message_of_loading(folder)


def test_a_pickled_checkpoint_is_not_read_and_the_converter_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(UserError, match="does not unpickle") as raised:
        open_checkpoint(tmp_path)
    assert "save_pretrained()" in str(raised.value)
    assert "pytorch_model.bin" in str(raised.value)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, "has no config.json"),
        ("{,", "not valid JSON"),
        ("3", "config.json is not a JSON object"),
        ("[]", "config.json is not a JSON object"),
    ],
)
def test_a_bad_config_is_named(folder: Path, config: str | None, expected: str) -> None:
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises(UserError, match=expected):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_hidden_layers": 0}, "config.json: num_hidden_layers = 0: must be an integer from 1 to "),
        ({"model_type": ["mamba"]}, 'config.json: model_type = ["mamba"]: must be a string'),
        ({"model_type": "llama"}, "model_type 'llama' is not supported; supported: falcon_mamba"),
    ],
    ids=str,
)
def test_a_bad_value_in_config_json_is_named_with_its_folder(
    folder: Path, change: dict[str, object], expected: str
) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | change))
    config = build_config(None, {"model": {"checkpoint": str(folder)}})
    with pytest.raises(UserError) as raised:
        open_source(config, "cpu")
    assert str(raised.value).startswith(f"{folder}: {expected}")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/no/such/folder", "no folder"),
        ("./no-such", "no folder"),
        ("a/b/c", "no folder"),
        ("~/no-such", "no folder"),
    ],
)
def test_a_folder_that_is_not_there_is_not_sought_on_the_hub(name: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        open_checkpoint(name)


def test_a_file_in_place_of_a_folder_is_said(folder: Path) -> None:
    with pytest.raises(UserError, match="is a file; give the folder"):
        open_checkpoint(first_file(folder))


def test_a_hub_id_offline_and_not_cached_is_an_error_of_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="not in the local cache, and the hub is offline"):
        open_checkpoint("somebody/some-mamba")


def hub_error(kind: type[Exception]) -> Exception:
    """An error of the hub's client without the response that it is made from."""
    error = kind.__new__(kind)
    Exception.__init__(error, "from the hub")
    return error


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (hub_errors.GatedRepoError, "gated"),
        (hub_errors.RepositoryNotFoundError, "no such model, or it is private"),
        (hub_errors.HfHubHTTPError, "download failed"),
        (ConnectionError, "download failed"),
    ],
)
def test_what_the_hub_refuses_is_an_error_of_ours(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], expected: str
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise hub_error(kind)

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=expected):
        open_checkpoint("somebody/some-mamba")


def test_one_rank_downloads_safetensors_only_and_the_others_look_after_the_barrier(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    calls: list[object] = []

    def download(name: str, *, allow_patterns: list[str], local_files_only: bool, **_: object) -> str:
        assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in allow_patterns)
        calls.append((name, local_files_only))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    for downloads in (True, False):
        open_checkpoint("somebody/some-mamba", downloads=downloads, barrier=lambda: calls.append("barrier"))
    assert calls == [("somebody/some-mamba", False), "barrier", "barrier", ("somebody/some-mamba", True)]


def test_the_others_are_not_left_waiting_when_the_download_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    with pytest.raises(UserError):
        open_checkpoint("/no/such/folder", barrier=lambda: calls.append("barrier"))
    assert calls == ["barrier"]


def test_auto_takes_the_dtype_of_the_configuration_then_of_the_tensors(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    for spelling in ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {"dtype": "torch.bfloat16"}):
        (folder / "config.json").write_text(json.dumps(config | spelling))
        assert resolve_dtype("auto", open_checkpoint(folder)) == torch.bfloat16
    (folder / "config.json").write_text(json.dumps(config))
    assert resolve_dtype("auto", open_checkpoint(folder)) == torch.float32
    assert resolve_dtype("float16", open_checkpoint(folder)) == torch.float16
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "int8"}))
    with pytest.raises(UserError, match="int8"):
        resolve_dtype("auto", open_checkpoint(folder))
