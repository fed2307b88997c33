"""`ssm-dist state`: save, inspect, resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssm_dist.cli import main
from ssm_dist.llm import LLM
from ssm_dist.sampling.params import SamplingParams
from tests.engine.checkpoints import save_checkpoint


def test_a_prompt_is_saved_inspected_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, file = save_checkpoint("zamba", tmp_path / "zamba"), tmp_path / "prompt.state"
    words = ["--model.checkpoint", str(folder), "--state.file", str(file)]
    assert main(["state", "save", *words, "--generation.prompts", "def f(x):"]) == 0
    assert "8 tokens" in capsys.readouterr().out
    assert main(["state", "inspect", "--state.file", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "Zamba" in shown and "float32" in shown and "7 x 80 x 8" in shown
    options = ["--generation.max_new_tokens", "12", "--generation.ignore_eos", "true"]
    assert main(["state", "resume", *words, *options, "--generation.prompts", " return"]) == 0
    wanted = LLM.from_pretrained(folder).generate(
        "def f(x): return", SamplingParams(max_new_tokens=12, ignore_eos=True)
    )[0]
    assert wanted.text is not None and wanted.text in capsys.readouterr().out
    output = ["--output.file", str(tmp_path / "answers.jsonl")]
    assert main(["state", "resume", *words, *options, "--generation.prompts", " return", "!", *output]) == 0
    first, second = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert first["text"] == wanted.text and first["token_ids"] == wanted.token_ids
    assert (first["index"], second["index"]) == (0, 1)
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": " return", "max_new_tokens": 3}\n{"prompt": " return"}\n')
    assert main(["state", "resume", *words, *options, "--generation.prompts_file", str(lines), *output]) == 0
    first, second = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert (len(first["token_ids"]), len(second["token_ids"])) == (3, 12)


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["state", "inspect"]) == 1
    assert "state.file" in capsys.readouterr().err
    assert main(["state", "inspect", "--state.file", str(tmp_path / "none")]) == 1
    assert "cannot read the state" in capsys.readouterr().err
    assert main(["state", "sav"]) == 1
    assert "state save" in capsys.readouterr().err
