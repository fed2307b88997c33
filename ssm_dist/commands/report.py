"""`ssm-dist report`: one page about many runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssm_dist.benchmark.page import page
from ssm_dist.benchmark.tables import MATCH
from ssm_dist.errors import UserError
from ssm_dist.places import make_folder

ABOUT = """Join runs of the benchmark, at several degrees or with several codecs, and of the peers' scripts.

    ssm-dist report --out benchmarks/h100 tp1/report.json tp2/report.json benchmarks/peers/vllm_0.24.0.json

Writes report.md and its plots into the folder. Of several runs of the same case, the last one counts.
"""


def run(words: Sequence[str]) -> None:
    """Write the page that the command line asks for. Raises `UserError` for files that are no such runs."""
    parser = argparse.ArgumentParser(
        prog="ssm-dist report", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, help="documents that [benchmark] or a peer's script wrote"
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder for the report")
    options = parser.parse_args(words)
    documents = [read(file) for file in options.runs]
    make_folder(options.out, "--out")
    file = options.out / "report.md"
    file.write_text(page(documents, options.out), encoding="utf-8")
    print(file)


def read(file: Path) -> dict[str, Any]:
    """A document, from a file of its own or from the last line of a run's output."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    for candidate in (text, text.rstrip().rpartition("\n")[2]):
        try:
            document = json.loads(candidate)
        except json.JSONDecodeError:
            continue
        if isinstance(document, dict) and {"system", "cases", "environment"} <= document.keys():
            _check(document, file)
            return document
    raise UserError(f"{file} is no document of a benchmark: it needs system, environment and cases")


def _check(document: dict[str, Any], file: Path) -> None:
    """Raise `UserError` for a document whose cases cannot be told apart."""
    cases = document["cases"]
    if not isinstance(document["environment"], dict) or not isinstance(cases, list):
        raise UserError(f"{file} is no document of a benchmark: environment is an object, and cases a list")
    for number, case in enumerate(cases):
        told = case if isinstance(case, dict) else {}
        lacking = [key for key in MATCH if not isinstance(told.get(key), (str, int))]
        if lacking:
            raise UserError(
                f"{file} is no document of a benchmark: case {number} lacks {', '.join(lacking)}"
            )
