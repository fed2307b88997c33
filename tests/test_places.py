"""Where results go: a place that is none is one message before the work, and what is written is JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssm_dist.cli import main
from ssm_dist.errors import UserError
from ssm_dist.places import check_file, make_folder
from tests.engine.checkpoints import save_checkpoint

NO_MODEL = ["--model.checkpoint", "/no/model/is/there"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def test_a_file_needs_a_folder_and_a_name_of_its_own(tmp_path: Path) -> None:
    check_file(tmp_path / "new", "--out")
    (tmp_path / "old").write_text("")
    check_file(tmp_path / "old", "--out")
    with pytest.raises(UserError, match=rf"--out: {tmp_path} is a folder; name a file"):
        check_file(tmp_path, "--out")
    for missing in (tmp_path / "none" / "file", tmp_path / "old" / "file"):
        with pytest.raises(UserError, match=rf"--out: there is no folder {missing.parent}"):
            check_file(missing, "--out")


def test_a_folder_is_made_with_those_above_it_unless_a_file_is_there(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b", "--out")
    make_folder(tmp_path / "a" / "b", "--out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"--out: {tmp_path / 'file'} is not a folder"):
        make_folder(tmp_path / "file", "--out")
    with pytest.raises(UserError, match=r"--out: cannot make the folder .*: Not a directory"):
        make_folder(tmp_path / "file" / "below", "--out")


def test_what_may_not_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, barred = tmp_path / "old", {tmp_path}
    old.write_text("")
    monkeypatch.setattr("os.access", lambda place, _mode: place not in barred)
    check_file(old, "--out")  # a file that is there needs no folder
    for call in (
        lambda: check_file(tmp_path / "new", "--out"),
        lambda: check_file(old, "--out", replaced=True),
        lambda: make_folder(tmp_path, "--out"),
    ):
        with pytest.raises(UserError, match=r"--out: .*may (not )?be written"):
            call()
    barred.add(old)
    with pytest.raises(UserError, match="old may not be written"):
        check_file(old, "--out")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--generation.prompts", "a", "--output.file"], "[output] file"),
        (["score", "--generation.prompts", "a", "--output.file"], "[output] file"),
        (["state", "save", "--generation.prompts", "a", "--state.file"], "[state] file"),
        (["state", "resume", "--state.file", "any", "--output.file"], "[output] file"),
        (["calibrate", "--parallel.tensor", "2", "--calibration.file"], "[calibration] file"),
        (["--benchmark.cases", "1x2+3", "--benchmark.profile"], "[benchmark] profile"),
    ],
    ids=["generate", "score", "state save", "state resume", "calibrate", "trace"],
)
def test_a_file_in_no_folder_is_named_before_the_model_is_looked_for(
    words: list[str], key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, str(tmp_path / "none" / "file"), *NO_MODEL]) == 1
    assert capsys.readouterr().err.endswith(f"error: {key}: there is no folder {tmp_path / 'none'}\n")


def test_a_report_in_the_place_of_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = tmp_path / "file", tmp_path / "run.json"
    file.write_text("")
    run.write_text('{"system": "x", "cases": [], "environment": {}}')
    assert main(["--benchmark.cases", "1x2+3", "--benchmark.folder", str(file), *NO_MODEL]) == 1
    assert capsys.readouterr().err == f"error: [benchmark] folder: {file} is not a folder\n"
    assert main(["report", "--out", str(file), str(run)]) == 1
    assert capsys.readouterr().err == f"error: --out: {file} is not a folder\n"


def test_prompts_none_of_which_can_run_are_said_once_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model.preset", "mamba-tiny", "--generation.prompts", "a", "b"]
    assert main([*words, "--output.file", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("needs a tokenizer") == 2
    assert "error: none of the prompts could run\n[0] a text prompt" in printed.err
    records = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [set(record) for record in records] == [{"index", "error"}] * 2


def test_a_benchmark_none_of_whose_cases_ran_has_failed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model.preset", "mamba-tiny", "--benchmark.breakdown", "false", "--benchmark.cases"]
    assert main([*words, "17x2+2"]) == 1
    printed = capsys.readouterr()
    assert "max_sequences is 16" in json.loads(printed.out.splitlines()[-1])["cases"][0]["error"]
    assert printed.err.endswith("error: none of the cases could run; the report says why of each\n")
    assert main([*words, "17x2+2", "1x2+2"]) == 0


def test_a_perplexity_of_no_token_is_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_checkpoint("mamba", tmp_path / "mamba")
    words = ["--model.checkpoint", str(folder), "--generation.prompts", "a", "ab"]
    assert main(["score", *words, "--output.file", str(tmp_path / "out")]) == 0
    assert "nan" not in capsys.readouterr().out

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / "out").read_text().splitlines()
    one, two = (json.loads(line, parse_constant=refuse) for line in lines)
    assert one["perplexity"] is None and two["perplexity"] > 1
