"""`ssm-dist calibrate`: from timings to a table, and the table back into a run."""

import os
import subprocess
import sys
from pathlib import Path

from ssm_dist.calibration import Timing, table_of
from ssm_dist.parallel.collectives.tables import ANY, CODECS, SHIPPED, table_from_json

ROOT = Path(__file__).parents[2]


def timings(codec: str, **seconds: list[float]) -> list[Timing]:
    """Of messages of 100, 400, 1600, ... bytes over shared memory."""
    return [
        Timing("shared", codec, algorithm, 100 * 4**i, taken)
        for algorithm, times in seconds.items()
        for i, taken in enumerate(times)
    ]


def test_the_fastest_serves_up_to_midway_to_where_another_is_clearly_faster() -> None:
    measured = [
        timing
        for codec in CODECS
        for timing in timings(codec, one_shot=[1.0, 2.0, 9.0, 30.0], bulk=[5.0, 1.98, 4.0, 8.0])
    ]
    table = table_of(measured, ranks=3)
    assert table["shared"][3] == {codec: [(800, "one_shot"), (ANY, "bulk")] for codec in CODECS}
    assert table["shared"][4] == SHIPPED["shared"][4] and table["gloo"] == SHIPPED["gloo"]


def test_an_algorithm_that_no_longer_fits_gives_way() -> None:
    measured = [t for codec in CODECS for t in timings(codec, one_shot=[1.0, 1.0], bulk=[2.0, 2.0, 2.0])]
    assert table_of(measured, ranks=2)["shared"][2]["none"] == [(800, "one_shot"), (ANY, "bulk")]


def program(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """infer.py on two CPU ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, ROOT / "infer.py", *words, "--model.preset", "mamba-tiny", "--parallel.tensor", "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_table_is_measured_written_and_used(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    done = program(
        "calibrate", "--calibration.file", file, "--calibration.repeats", "1", "--prefill.chunk_tokens", "16"
    )
    assert done.returncode == 0 and "written to" in done.stdout, done.stderr
    table = table_from_json(file.read_text(), "file")
    assert {name for rows in table["gloo"][2].values() for _, name in rows} <= {"all_reduce", "exchange"}
    done = program("--reduction.table", file, "--generation.prompts_file", prompts(tmp_path))
    assert done.returncode == 0, done.stderr


def test_a_file_that_is_no_table_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text("{}")
    for file, says in (
        (tmp_path / "table.json", "no table of reductions"),
        (tmp_path / "none", "cannot read"),
    ):
        done = program("--reduction.table", file, "--generation.prompts_file", prompts(tmp_path))
        assert done.returncode != 0
        assert done.stderr.count("error: ") == 1 and says in done.stderr, done.stderr


def prompts(folder: Path) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text('{"prompt_token_ids": [1, 2, 3], "max_new_tokens": 2}\n')
    return file
