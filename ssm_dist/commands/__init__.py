"""Subcommands, one module each, imported when it is called.

Module `ssm_dist.commands.NAME` has `run(config) -> None`. A command with options of its own has a subclass of
`Config` as its schema, with one more section, whose keys are then flags and TOML keys like all others. A
command that runs no model has no schema: its module has `run(words) -> None` and reads its words itself.
"""

from dataclasses import dataclass

from ssm_dist.config import Config


@dataclass(frozen=True)
class Command:
    """What the command line knows of a subcommand before it imports it."""

    summary: str
    schema: type[Config] | None = Config


COMMANDS = {
    "generate": Command("Continue prompts, and stream the text. The default, when no command is named."),
    "kernels": Command("Time every op against its floor, its definition and its peers.", schema=None),
    "plan": Command("Print how each parameter is placed and what a layer reduces, without any weights."),
    "score": Command("Log-probability of every token, and perplexity, of the texts given as prompts."),
}
