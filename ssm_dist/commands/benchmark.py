"""The benchmark of a configuration with [benchmark] batches."""

import json
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from ssm_dist.benchmark import markdown, run_benchmark
from ssm_dist.config import Config
from ssm_dist.llm import LLM


def run(config: Config) -> None:
    """Measure the grid; rank 0 prints the table, and the JSON document as the last line of output."""
    llm = LLM.from_config(config)
    report = run_benchmark(llm, config.benchmark)
    if llm.loaded.tp is not None and llm.loaded.tp.rank > 0:
        return
    page, document = markdown(report), json.dumps(report)
    if config.benchmark.folder is not None:
        _write(config.benchmark.folder, page, document)
    Console().print(Markdown(page))
    print(document)


def _write(folder: Path, page: str, document: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(page)
    (folder / "report.json").write_text(document + "\n")
