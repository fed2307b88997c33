"""Subcommands, one module each, imported when it is called.

Module `ssm_dist.commands.NAME` has `run(config) -> None`; for "NAME ACTION" it has `ACTION(config)`. A
command with options of its own has a subclass of `Config` as its schema, with one more section, whose keys
are then flags and TOML keys like all others. A command that runs no model has no schema: its module has
`run(words) -> None` and reads its words itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, model_validator

from ssm_dist.config import Config, ModelConfig, Section
from ssm_dist.places import check_file


@dataclass(frozen=True)
class Command:
    """What the command line knows of a subcommand before it imports it."""

    summary: str
    schema: type[Config] | None = Config
    alone: bool = False
    """Whether it takes no ranks: under torchrun rank 0 runs it, and the others have nothing to do."""


def speaks() -> bool:
    """Whether this process prints and writes, for all ranks: it is rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def check_place(file: Path | None, key: str, *, replaced: bool = False) -> None:
    """`places.check_file` of the file that a key names, if any, by the rank that will write it."""
    if file is not None and speaks():
        check_file(file, key, replaced=replaced)


class StateConfig(Section):
    file: Path | None = None
    """The file of the state."""


class StateJob(Config):
    """A job with a file of a saved state."""

    state: StateConfig = StateConfig()
    """The saved state."""


class AnyModel(ModelConfig):
    """No model need be named."""

    @model_validator(mode="after")
    def _names_one_model(self) -> AnyModel:
        return self


class InspectJob(StateJob):
    """A job that needs no model."""

    model: AnyModel = AnyModel()
    """Not needed."""


class CalibrationConfig(Section):
    file: Path = Path("reductions.json")
    """Where the table of reductions is written."""

    repeats: int = Field(9, strict=True, ge=1)
    """How often each time is taken; the median counts."""


class CalibrationJob(Config):
    """A job that measures the reductions."""

    calibration: CalibrationConfig = CalibrationConfig()
    """How reductions are measured."""


COMMANDS = {
    "calibrate": Command("Measure the reductions between ranks here, for --reduction.table.", CalibrationJob),
    "generate": Command("Continue prompts, and stream the text. The default, when no command is named."),
    "kernels": Command("Time every op against its floor, its definition and its peers.", None, alone=True),
    "plan": Command(
        "Print how each parameter is placed and what a layer reduces, without any weights.", alone=True
    ),
    "report": Command(
        "Join runs of [benchmark], and the peers', into one page with plots.", None, alone=True
    ),
    "score": Command("Log-probability of every token, and perplexity, of the texts given as prompts."),
    "state inspect": Command(
        "Say what a file of a saved state holds; loads no model.", InspectJob, alone=True
    ),
    "state resume": Command("Continue from state.file, with each of the prompts or with nothing.", StateJob),
    "state save": Command("Write the state after the prompt to state.file.", StateJob),
}
