"""`ssm-dist state save|inspect|resume`: the memory of a prompt as a file."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ssm_dist.commands import StateJob, check_place, speaks
from ssm_dist.errors import UserError
from ssm_dist.llm import LLM
from ssm_dist.outputs import write_completions
from ssm_dist.prompts_file import read_prompts
from ssm_dist.report import run_table, size
from ssm_dist.requests import Prompt
from ssm_dist.sampling.params import SamplingParams
from ssm_dist.state_file import inspect_state


def save(job: StateJob) -> None:
    """Write the state after the one prompt."""
    file, prompts = _file(job), [prompt for prompt, _ in _prompts(job)]
    if len(prompts) != 1:
        raise UserError(f"a state is saved after one prompt, and {len(prompts)} are given")
    check_place(file, "[state] file", replaced=True)
    llm = LLM.from_config(job)
    state = llm.save_state(file, prompts[0])
    if speaks():
        shown = f"{file}: {len(state.token_ids)} tokens, {size(file.stat().st_size)}"
        Console(highlight=False, markup=False).print(shown, soft_wrap=True)


def inspect(job: StateJob) -> None:
    """Print what a file says of itself."""
    file = _file(job)
    info, token_ids, shapes = inspect_state(file)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {
        "model": f"{info.model_type}, fingerprint {info.fingerprint[:16]}",
        "tokens": f"{len(token_ids)}, SHA-256 {info.history[:16]}",
        "state": f"{info.state_dtype}; convolution, keys and values {info.dtype}",
        "size": size(file.stat().st_size),
        **{name: " x ".join(map(str, shape)) for name, shape in shapes.items() if name != "token_ids"},
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


def resume(job: StateJob) -> None:
    """Continue from the file with each prompt, or with nothing more; [output] file gets the answers too."""
    file, given = _file(job), _prompts(job) or [("", SamplingParams.of(job.generation))]
    check_place(job.output.file, "[output] file")
    llm = LLM.from_config(job)
    state = llm.load_state(file)
    prompts, params = [prompt for prompt, _ in given], [sampling for _, sampling in given]
    completions = llm.generate(prompts, params, after=state)
    if not speaks():
        return
    if job.output.file is not None:
        write_completions(job.output.file, completions)
    console = Console(highlight=False, markup=False)
    for prompt, completion in zip(prompts, completions, strict=True):
        console.print(f"[{completion.index}] ", style="bold cyan", end="")
        console.print(prompt if isinstance(prompt, str) else "", style="dim", end="", soft_wrap=True)
        answer = " ".join(map(str, completion.token_ids)) if completion.text is None else completion.text
        console.print(answer + "\n", soft_wrap=True)
    Console().print(run_table(llm, completions))


def _file(job: StateJob) -> Path:
    if job.state.file is None:
        raise UserError("no file is named; set state.file")
    return job.state.file


def _prompts(job: StateJob) -> list[tuple[Prompt, SamplingParams]]:
    """Those of the job, each with its options."""
    options, base = job.generation, SamplingParams.of(job.generation)
    if options.prompts_file is None:
        return [(prompt, base) for prompt in options.prompts]
    return read_prompts(options.prompts_file, base)
