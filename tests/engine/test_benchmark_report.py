"""The report of several runs: what is compared with what, and that plots are drawn."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ssm_dist import UserError
from ssm_dist.benchmark import page as page_module
from ssm_dist.benchmark.page import page
from ssm_dist.benchmark.tables import label, number, rows_of, table
from ssm_dist.benchmark.targets import TARGETS, compared, scaled
from ssm_dist.cli import main
from ssm_dist.commands.report import read, run
from tests.engine.benchmarks import configuration, measured
from tests.ranks import run_on_ranks

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
PNG = b"\x89PNG\r\n\x1a\n"


def load_measure() -> Any:
    """The module that the peers' scripts share."""
    spec = importlib.util.spec_from_file_location("peers_measure", PEERS / "measure.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["peers_measure"] = module
    spec.loader.exec_module(module)
    return module


def peers_document(file: Path, case: str) -> dict[str, Any]:
    """What a peer's script writes, of a peer that does nothing and cannot do one case."""
    measure = load_measure()

    def generate(ids: Any, new_tokens: int) -> None:
        if len(ids) > 1:
            raise RuntimeError("too many\nat once")

    peer = measure.Peer("mamba-tiny", generate, {"forward": lambda ids: None})
    options = argparse.Namespace(out=file, cases=None, repeats=2, case_seconds=20)
    measure.measure(peer, measure.new_document("idle", "1.0"), options, [case, "2x8+3"])
    return read(file)


def test_runs_of_two_degrees_and_a_peer_join_into_one_page_with_plots(tmp_path, capsys):
    grid = {"batches": [1, 2], "prompt_tokens": [4, 16], "new_tokens": 4}
    files = []
    for degree in (1, 2):
        document, _ = run_on_ranks(degree, measured, configuration("mamba-tiny", degree, **grid))[0]
        files.append(tmp_path / f"degree{degree}.json")
        files[-1].write_text(f"tables come first\n{json.dumps(document)}\n")
    peer = tmp_path / "new" / "peer.json"
    written = peers_document(peer, "1x4+4")
    assert written["cases"][1]["error"] == "RuntimeError: too many"
    run(["--out", str(tmp_path / "report"), *map(str, [*files, peer])])
    report = Path(capsys.readouterr().out.splitlines()[-1])
    text = report.read_text()
    assert "| 1x4+4 | idle 1.0 | 1 |" in text and "RuntimeError: too many" in text
    decode = [line.split(" | ") for line in text.partition("### Decode")[2].partition("###")[0].splitlines()]
    times, peers = decode[2].index("× 1 GPU"), decode[2].index("× best peer")
    assert {row[2] for row in decode if len(row) > times and row[times] not in ("-", "× 1 GPU")} == {"2"}
    assert [row[0] for row in decode[4:] if len(row) > peers and row[peers] != "-"] == ["| 1x4+4"]
    shown = [line[line.index("](") + 2 : -1] for line in text.splitlines() if line.startswith("![")]
    names = ("requests", "prefill", "context", "batch", "decode", "roofline")
    assert shown == [f"mamba-tiny_{name}.png" for name in names]
    for name in shown:
        drawn = (report.parent / name).read_bytes()
        assert drawn.startswith(PNG) and len(drawn) > 10_000


def test_a_single_case_has_its_roofline(tmp_path):
    case = row(decode_flop_a_byte=2.0, decode_tflop_per_second_a_rank=3.0)
    about = {"ceilings": {"bytes": 4e12, "flops": 8e14, "special": 4e12}}
    text = page([document(case, environment=about)], tmp_path)
    assert "(mamba-2.8b_roofline.png)" in text and (tmp_path / "mamba-2.8b_roofline.png").exists()


def test_without_matplotlib_the_page_says_once_that_plots_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module.importlib.util, "find_spec", lambda name: None)
    text = page([document(row(), row(model="zamba-7b"))], tmp_path)
    assert text.count("matplotlib is not installed") == 1 and not list(tmp_path.iterdir())


def row(**changed: Any) -> dict[str, Any]:
    case = {"model": "mamba-2.8b", "degree": 1, "batch": 1, "prompt_tokens": 16, "new_tokens": 129}
    return case | {"decode_ms_a_step": 2.0} | changed


def document(*cases: dict[str, Any], system: str = "ssm-dist", **more: Any) -> dict[str, Any]:
    return {"system": system, "version": "1", "environment": {}, "cases": list(cases)} | more


def test_a_target_is_met_by_the_best_codec_and_missed_by_the_worst_case():
    prefill = {"decode_ms_a_step": None, "new_tokens": 1, "degree": 2}
    ours = document(
        row(degree=2, decode_ms_a_step=1.2), row(degree=2, codec="int8", decode_ms_a_step=1.0),
        row(**prefill, batch=8, prompt_tokens=2048, codec="int8", prefill_tokens_per_second=190e3),
        row(**prefill, batch=1, prompt_tokens=32768, codec="int8", prefill_tokens_per_second=160e3),
        row(**prefill, batch=1, prompt_tokens=8192, codec="int8", prefill_tokens_per_second=1e3),
        row(degree=2, p2p=False, decode_ms_a_step=0.1),
    )  # fmt: skip
    peer = document(row(degree=2, decode_ms_a_step=3.0), row(decode_ms_a_step=0.5), system="other")
    found = {item["target"]: item for item in compared(rows_of([ours, peer]))}
    assert {item["degree"] for item in found.values()} == {2}
    decode = found["decode, 1 sequence"]
    assert (decode["met"], decode["measured"], decode["codec"]) == ("met", 1.0, "int8")
    assert (decode["peer"], decode["peer_times"]) == ("other 1", 3.0)
    quantised = found["prefill, 16,384 tokens or more, int8"]
    assert (quantised["met"], quantised["case"]) == ("not met", "1x32768+1")
    assert found["prefill, 16,384 tokens or more"]["met"] == "not measured"


def test_scaling_is_against_our_own_single_gpu():
    case = {"batch": 64, "prompt_tokens": 2048, "new_tokens": 128}
    rates = ((1, "none", 100.0), (2, "none", 169.0), (2, "int8", 171.0))
    cases = [row(**case, degree=d, codec=c, output_tokens_per_second=rate) for d, c, rate in rates]
    found = [(item["system"], item["times"], item["met"]) for item in scaled(rows_of([document(*cases)]))]
    assert found == [("ssm-dist", 1.69, "not met"), ("ssm-dist, int8", 1.71, "met")]


def test_scaling_is_against_a_single_gpu_that_ran_in_the_same_way():
    case = {"batch": 64, "prompt_tokens": 2048, "new_tokens": 128}
    ways = ({"kernels": "reference", "compile": "none"}, {"kernels": "triton", "compile": "capture"})
    rates = ((1, ways[0], 10.0), (1, ways[1], 100.0), (2, ways[1], 180.0), (2, {"kernels": "other"}, 9.0))
    cases = [row(**case, **way, degree=d, output_tokens_per_second=rate) for d, way, rate in rates]
    assert [item["times"] for item in scaled(rows_of([document(*cases)]))] == [1.8]


def test_of_runs_of_the_same_case_the_last_one_counts():
    early, late = document(row(decode_ms_a_step=9.0)), document(row(decode_ms_a_step=2.0), row(p2p=False))
    assert [found["decode_ms_a_step"] for found in rows_of([early, late])] == [2.0, 2.0]


def test_a_run_is_named_by_what_it_did_otherwise_than_by_default():
    usual = {"kernels": "triton", "compile": "capture", "state_dtype": "float32"}
    other = {
        "kernels": "mamba_ssm",
        "compile": "none",
        "state_dtype": "bfloat16",
        "codec": "int8",
        "p2p": False,
    }
    rows = rows_of([document(row(**usual), row(**other)), document(row(), system="peer", quoted="a page")])
    names = ["ssm-dist", "ssm-dist, int8, no P2P, mamba_ssm, uncaptured, bfloat16 states", "peer 1 (quoted)"]
    assert list(map(label, rows)) == names


def test_every_target_is_of_a_preset_and_can_be_reached_by_a_bundled_case():
    cases = [(1, 16, 129), (64, 16, 65), (256, 16, 33), (8, 2048, 1), (64, 2048, 128)]
    keys = ("batch", "prompt_tokens", "new_tokens")
    for target in TARGETS:
        offered = [
            row(**dict(zip(keys, case, strict=True)), model=target.model) | {target.measure.name: 1.0}
            for case in cases
        ]
        assert any(target.holds_for(one) for one in offered), target


def test_quoted_systems_are_marked_and_bring_no_models_of_their_own(tmp_path):
    vllm = read(PEERS / "vllm_0.24.0.json")
    text = page([document(row()), vllm], None)
    assert "vLLM 0.24.0 (quoted)" in text and "## mamba-2.8b" in text and "## falcon" not in text
    assert "| 1x16+129 | ssm-dist | 1 | 2 | - | 1.69 |" in text  # 3.37 ms against 2


def test_files_that_are_no_documents_are_refused(tmp_path, capsys):
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"rows": []}')
    with pytest.raises(UserError, match="no document of a benchmark"):
        read(wrong)
    for cases, says in (("[{}]", "case 0 lacks model, batch"), ("3", "cases a list"), ("[3]", "case 0 la")):
        wrong.write_text(f'{{"system": "x", "cases": {cases}, "environment": {{}}}}')
        with pytest.raises(UserError, match=f"{wrong} is no document of a benchmark: .*{says}"):
            read(wrong)
    assert main(["report", "--out", str(tmp_path), str(tmp_path / "none.json")]) == 1
    assert "cannot read" in capsys.readouterr().err


def test_a_table_leaves_out_columns_that_nobody_has():
    columns = {"a": lambda one: one.get("a"), "b": lambda one: one.get("b"), "c": lambda one: None}
    text = table(columns, [{"a": 1234567.0, "b": "x|y"}, {"b": "z"}])
    assert text == "| a | b |\n|---:|---|\n| 1,234,567 | x\\|y |\n| - | z |\n"
    assert [number(v) for v in (0.123456, 12345, True, None)] == ["0.1235", "12,345", "True", "-"]


@pytest.mark.slow
def test_replicas_run_together_and_count_as_many_gpus(tmp_path):
    out = tmp_path / "replicas.json"
    command = [sys.executable, "benchmarks/replicas.py", "--model", "mamba-tiny", "--replicas", "2"]
    command += ["--cases", "4x8+3", "--repeats", "2", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": "."}
    done = subprocess.run(
        command, cwd=PEERS.parents[1], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == read(out)
    (case,) = read(out)["cases"]
    assert (case["degree"], case["replicas"], case["batch"]) == (2, 2, 4)
    assert case["output_tokens_per_second"] == pytest.approx(12 / case["request_seconds"]["median"], abs=0.1)
    one = {"system": "ssm-dist", "environment": {}, "cases": [case | {"degree": 1, "replicas": None}]}
    text = page([one | {"version": "1"}, read(out)], None)
    assert "| 4x8+3 | ssm-dist, replicas | 2 |" in text and "× 1 GPU" in text
