"""The whole program, started as users start it: what it prints and writes, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.checkpoints import save_checkpoint

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

LINES = [
    '{"prompt": "def f"}',
    '{"prompt_token_ids": [1, 2, 3], "max_new_tokens": 3, "ignore_eos": true}',
    '{"prompt": "x", "temperature": 0.7, "seed": 5, "logprobs": 2}',
    '{"prompt": ""}',
    '{"prompt_token_ids": [1, 5000]}',
    '{"prompt": "x", "temprature": 0.7}',
    '{"prompt": "x", "top_p": 7}',
    "not json",
    '{"text": "x"}',
]
ERRORS = {3: "empty", 4: "out of range", 5: "temprature", 6: "top_p", 7: "JSON", 8: "exactly one of"}


def program(ranks: int, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """infer.py with these words on so many CPU ranks (0: without torchrun), within two minutes."""
    launcher = [*TORCHRUN, str(ranks)] if ranks else [sys.executable]
    parallel = ["--parallel.tensor", str(ranks)] if ranks else []
    return subprocess.run(
        [*launcher, ROOT / "infer.py", *words, *parallel],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("mamba", tmp_path_factory.mktemp("mamba"))


@pytest.fixture
def records(folder: Path, tmp_path: Path) -> Callable[[int], list[dict[str, object]]]:
    """The output file of a run over `LINES`."""

    def run(ranks: int) -> list[dict[str, object]]:
        prompts, output = tmp_path / "prompts.jsonl", tmp_path / f"{ranks}.jsonl"
        prompts.write_text("\n".join(LINES) + "\n\n")
        done = program(
            ranks, "--model.checkpoint", folder, "--generation.prompts_file", prompts,
            "--generation.max_new_tokens", "6", "--output.file", output,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "time to first token" in done.stdout and "weights a rank" in done.stdout
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


def test_a_prompts_file_is_answered_line_by_line_alike_on_one_rank_and_two(
    records: Callable[[int], list[dict[str, object]]],
):
    alone, together = records(0), records(2)
    assert [r["index"] for r in alone] == list(range(len(LINES)))
    for index, record in enumerate(alone):
        if index in ERRORS:
            assert set(record) == {"index", "error"} and ERRORS[index] in str(record["error"])
        else:
            assert {"token_ids", "text", "finish_reason", "seconds", "seconds_to_first_token"} < set(record)
            assert record["token_ids"] == together[index]["token_ids"]
    assert alone[0]["prompt"] == "def f" and alone[1]["prompt_token_ids"] == [1, 2, 3]
    assert len(alone[1]["token_ids"]) == 3
    assert len(alone[2]["logprobs"]) == len(alone[2]["token_ids"])
    assert [r.get("error") for r in alone] == [r.get("error") for r in together]


def test_scores_are_printed_and_written(folder: Path, tmp_path: Path):
    output = tmp_path / "scores.jsonl"
    done = program(
        2,
        "score",
        "--model.checkpoint",
        folder,
        "--generation.prompts",
        "abc",
        "defg",
        "--output.file",
        output,
    )
    assert done.returncode == 0 and "perplexity" in done.stdout, done.stderr
    scores = [json.loads(line) for line in output.read_text().splitlines()]
    assert [len(s["log_probs"]) for s in scores] == [2, 3]
    assert all(p < 0 for s in scores for p in s["log_probs"])


def test_the_plan_is_printed_without_ranks_for_any_degree():
    done = program(0, "plan", "--model.preset", "zamba-7b", "--parallel.tensor", "4")
    assert done.returncode == 0, done.stderr
    assert "on GPUs, where a preset is bfloat16" in done.stdout
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.split()}
    assert "Shard(1)" in rows["layers.*.mixer.in_proj.weight"]
    assert "2 x 1856 x 3712" in rows["layers.*.mixer.in_proj.weight"]
    reduction = done.stdout[done.stdout.index("Reductions") :]
    x_proj = next(line for line in reduction.splitlines() if "x_proj" in line)
    assert x_proj.split()[-2:] == ["264", "2"]


def damaged(folder: Path, target: Path, damage: Callable[[Path], None]) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    damage(target)
    return target


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def unknown_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [(truncate, "bytes"), (pickle_only, "unpickle"), (unknown_type, "'llama' is not supported")],
    ids=["truncated", "pickle only", "unknown model type"],
)
def test_a_bad_checkpoint_is_one_message_from_one_rank(
    damage: Callable[[Path], None], says: str, folder: Path, tmp_path: Path
):
    bad = damaged(folder, tmp_path / "bad", damage)
    done = program(2, "--model.checkpoint", bad, "--generation.prompts", "x")
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and says in done.stderr, done.stderr
    assert str(ROOT / "ssm_dist") not in done.stderr, "a user's mistake shows no traceback of ours"


def test_a_degree_that_does_not_divide_is_one_message_with_the_degrees_that_do():
    done = program(3, "--model.preset", "mamba-tiny", "--generation.prompts", "x")
    assert done.returncode != 0
    assert done.stderr.count("error: degree 3 does not divide") == 1
    assert "degrees that work: 1, 2, 4, 8, 16, 32, 64" in done.stderr


def test_prompts_none_of_which_can_run_end_all_ranks_with_one_message_and_a_record(tmp_path: Path):
    output = tmp_path / "out.jsonl"
    done = program(2, "--model.preset", "mamba-tiny", "--generation.prompts", "x", "--output.file", output)
    assert done.returncode != 0 and done.stderr.count("a text prompt needs a tokenizer") == 1, done.stderr
    assert "tokenizer" not in done.stdout and "tokenizer" in json.loads(output.read_text())["error"]


def test_without_prompts_the_program_says_so():
    done = program(0, "--model.preset", "mamba-tiny")
    assert done.returncode == 1 and done.stderr.count("error: there is nothing to do") == 1
