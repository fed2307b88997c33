"""The benchmark of a configuration with [benchmark] batches or cases."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from ssm_dist.benchmark.page import page
from ssm_dist.benchmark.program import Document, run_benchmark
from ssm_dist.commands import check_place, speaks
from ssm_dist.config import Config
from ssm_dist.errors import UserError
from ssm_dist.places import make_folder


def run(config: Config) -> None:
    """Measure all cases; rank 0 prints the tables, and the JSON document as the last line of output.

    Raises `UserError`, on rank 0 and after all that, when no case could run.
    """
    folder = config.benchmark.folder
    check_place(config.benchmark.profile, "[benchmark] profile")
    if folder is not None and speaks():
        make_folder(folder, "[benchmark] folder")

    def save(document: Document) -> None:
        if folder is not None and speaks():
            _write(folder / "report.json", document)

    document = run_benchmark(config, save)
    if not speaks():
        return
    save(document)
    if folder is not None:
        (folder / "report.md").write_text(page([document], folder))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(Markdown(page([document], None)))
    print(json.dumps(document))
    if all("error" in case for case in document["cases"]):
        raise UserError("none of the cases could run; the report says why of each")


def _write(file: Path, document: Document) -> None:
    """In one stroke, so that a run that is ended leaves what it has measured."""
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(document) + "\n")
    unfinished.replace(file)
