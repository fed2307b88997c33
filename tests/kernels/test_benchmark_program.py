"""`ssm-dist kernels` on a CPU, where it times the definitions at tiny shapes."""

import json
from pathlib import Path

import pytest

from ssm_dist.errors import UserError
from ssm_dist.kernel_benchmark import cases
from ssm_dist.kernel_benchmark.program import main
from ssm_dist.kernels import __all__ as ops


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "PREFILLS", ((2, 5),))
    monkeypatch.setattr(cases, "DECODES", (1, 3))
    monkeypatch.setattr(cases, "CONTEXT", 48)
    monkeypatch.setattr(cases, "ATTENTIONS", ((3, 1), (2, 5)))
    monkeypatch.setattr(cases, "ROWS", (7,))


def test_every_op_is_timed_and_the_last_line_is_one_document(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    names = ["mamba-tiny", "falcon-mamba-tiny", "zamba-tiny"]
    main(["--models", *names, "--degrees", "1", "2", "3", "--out", str(tmp_path / "kernels.json")])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads((tmp_path / "kernels.json").read_text())
    page = (tmp_path / "kernels.md").read_text()
    assert page.count("\n| ") == len(report["rows"]) + 2 * len(names)  # two lines at the head of a table
    assert {row["op"] for row in report["rows"]} == set(ops)
    assert {row["degree"] for row in report["rows"]} == {1, 2}
    assert all(row["us"] > 0 and row["reference_us"] > 0 for row in report["rows"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--degrees", "3", "5"], r"--degrees: 3 or 5 divides d_inner of none of the models \(mamba-tiny\)"),
        (["--degrees", "1", "0"], "--degrees: 0 is no degree"),
        (["--ops", "paged_attention"], "--ops: none of the models has a case of paged_attention"),
        (["--ops", "linear", "--sweep"], "--ops: .* with configurations to sweep of linear"),
    ],
    ids=["no divisor", "zero", "op of another model", "no candidates"],
)
def test_nothing_to_time_is_a_users_mistake(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        main(["--models", "mamba-tiny", *words])


def test_a_place_without_a_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--out: there is no folder"):
        main(["--models", "mamba-tiny", "--out", str(tmp_path / "new" / "kernels.json")])
    assert not (tmp_path / "new").exists()


def test_a_case_counts_what_its_op_must_move() -> None:
    conv = next(
        c for c in cases.cases(["mamba-2.8b"], [4]) if c.op == "causal_conv_update" and c.sequences == 3
    )
    assert conv.bytes == 2 * 1280 * (3 * (1 + 3 + 3 + 1) + 4 + 1)
    scan = next(c for c in cases.cases(["mamba-2.8b"], [1]) if c.op == "selective_scan")
    assert scan.special == 10 * 5120 * 20
