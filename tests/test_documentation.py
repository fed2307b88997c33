"""What the documentation shows is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ssm_dist import parallel
from ssm_dist.commands import COMMANDS
from ssm_dist.config import Config
from ssm_dist.parallel.plans.mamba import MAMBA_PLAN

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "docs").glob("*.md"),
    ROOT / "benchmarks/README.md",
]


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_plan_in_the_readme_is_mambas() -> None:
    names: dict[str, object] = {}
    exec(python_blocks(README)[0], vars(parallel), names)
    assert names["MAMBA_PLAN"] == MAMBA_PLAN


def test_the_readme_names_every_key_of_the_configuration() -> None:
    rows = dict(re.findall(r"^\| `\[(\w+)\]` \| (.*) \|$", README, re.MULTILINE))
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    assert rows.keys() == sections.keys()
    for name, section in sections.items():
        assert set(re.findall(r"`(\w+)`", rows[name])) == set(section.model_fields), name  # type: ignore[union-attr]


def test_the_readme_names_every_command() -> None:
    table = README[README.index("| command |") : README.index("### What works today")]
    for name in COMMANDS:
        assert f"`{name.split()[-1]}`" in table or f"ssm-dist {name}`" in table, name


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_python_api_runs_as_it_is_shown(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    (tmp_path / "manual.txt").write_text("def open(self):\n    return self\n")
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks((ROOT / page).read_text())
    first = next(i for i, block in enumerate(blocks) if "import LLM" in block)
    names: dict[str, object] = {}
    for block in blocks[first:]:
        if "shard_module" not in block:  # examples/transformers_mamba.py is that
            exec(block, names)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
