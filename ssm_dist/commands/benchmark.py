"""The benchmark of a configuration with [benchmark] batches or cases."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from ssm_dist.benchmark.page import page
from ssm_dist.benchmark.program import Document, run_benchmark
from ssm_dist.config import Config


def run(config: Config) -> None:
    """Measure all cases; rank 0 prints the tables, and the JSON document as the last line of output."""
    folder, speaks = config.benchmark.folder, os.environ.get("RANK", "0") == "0"
    if folder is not None and speaks:
        folder.mkdir(parents=True, exist_ok=True)

    def save(document: Document) -> None:
        if folder is not None and speaks:
            _write(folder / "report.json", document)

    document = run_benchmark(config, save)
    if not speaks:
        return
    save(document)
    if folder is not None:
        (folder / "report.md").write_text(page([document], folder))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(Markdown(page([document], None)))
    print(json.dumps(document))


def _write(file: Path, document: Document) -> None:
    """In one stroke, so that a run that is ended leaves what it has measured."""
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(document) + "\n")
    unfinished.replace(file)
