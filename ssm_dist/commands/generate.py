"""`ssm-dist`: continue prompts, stream the text, write the results, say how fast it went."""

from __future__ import annotations

import logging
from collections import defaultdict
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typing_extensions import Self

from ssm_dist.commands import benchmark, check_place, speaks
from ssm_dist.config import Config
from ssm_dist.errors import UserError
from ssm_dist.generation import Collector, TokenEvent
from ssm_dist.llm import LLM
from ssm_dist.outputs import write_completions
from ssm_dist.prompts_file import read_lines
from ssm_dist.report import run_table
from ssm_dist.requests import Request
from ssm_dist.sampling.params import SamplingParams

LONG = 4
"""Chunks of a step beyond which prompts are so long that their reading is shown."""


def run(config: Config) -> None:
    """Answer the configuration's prompts, or time its benchmark. Every rank runs this; rank 0 speaks."""
    if config.benchmark.wanted:
        benchmark.run(config)
        return
    options = config.generation
    if not options.prompts and options.prompts_file is None:
        raise UserError("there is nothing to do: set generation.prompts or generation.prompts_file")
    lines = [] if options.prompts_file is None else read_lines(options.prompts_file)
    base = SamplingParams.of(options)
    check_place(config.output.file, "[output] file")
    llm = LLM.from_config(config)
    logging.getLogger(__name__).info("reductions: %s", llm.reduction)
    requests = (
        llm.prepare_lines(lines, base)
        if lines
        else llm.prepare(list(options.prompts), [base] * len(options.prompts))
    )
    collector = Collector(requests, with_text=llm.tokenizer is not None)
    none_runs = all(request.error is not None for request in requests)
    shows = speaks() and not none_runs
    printer = Printer(requests, Console(highlight=False, markup=False)) if shows else None
    console = Console(stderr=True, quiet=not shows)
    with Reading(requests, llm.loaded.chunk_tokens, console) as reading:
        for event in llm.run(requests, reading.add):
            reading.end()
            collector.add(event)
            if printer is not None:
                printer.add(event)
    if not speaks():
        return
    if config.output.file is not None:
        write_completions(config.output.file, collector.completions)
    if none_runs:
        reasons = "\n".join(f"[{c.index}] {c.error}" for c in collector.completions)
        raise UserError(f"none of the prompts could run\n{reasons}")
    Console().print(run_table(llm, collector.completions))


class Reading:
    """On a terminal, a line that says how much of long prompts has been read, until the first token comes."""

    def __init__(self, requests: list[Request], chunk_tokens: int, console: Console) -> None:
        self._read: dict[int, int] = {}
        total = sum(len(request.token_ids) for request in requests)
        self._bar: Progress | None = None
        if console.is_interactive and not console.quiet and total > LONG * chunk_tokens:
            columns = TextColumn("Reading prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def add(self, index: int, tokens: int) -> None:
        """So many tokens of a request's prompt have been read by now."""
        if self._bar is not None:
            self._bar.advance(self._task, tokens - self._read.get(index, 0))
            self._read[index] = tokens

    def end(self) -> None:
        """Take the line away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Printer:
    """Shows texts as they come, one request after the other: a later one waits for its turn."""

    def __init__(self, requests: list[Request], console: Console) -> None:
        self._console = console
        self._order = [request.index for request in requests]
        self._prompts = {request.index: request.prompt for request in requests}
        self._held: dict[int, list[TokenEvent]] = defaultdict(list)
        self._open = False

    def add(self, event: TokenEvent) -> None:
        """Take in an event, and show what is its turn."""
        self._held[event.index].append(event)
        while self._order and self._held[self._order[0]]:
            if self._show(self._held[self._order[0]].pop(0)):
                self._order.pop(0)

    def _show(self, event: TokenEvent) -> bool:
        """Print one event; True when it is the last of its request."""
        if not self._open:
            prompt = self._prompts[event.index]
            self._console.print(f"[{event.index}] ", style="bold cyan", end="")
            self._console.print(prompt or "", style="dim", end="", soft_wrap=True)
            self._open = True
        if event.error is not None:
            self._console.print(f"error: {event.error}", style="red", end="", soft_wrap=True)
        elif self._prompts[event.index] is None:
            self._console.print(f"{event.token_id} ", end="", soft_wrap=True)
        else:
            self._console.print(event.text, end="", soft_wrap=True)
        self._console.file.flush()
        if event.finish_reason is not None:
            self._console.print("\n")
            self._open = False
        return event.finish_reason is not None
