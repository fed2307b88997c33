"""The command line made from the configuration's schema, by tyro."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_args, get_origin

import tyro
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ssm_dist.errors import UserError


def read_flags(
    schema: type[BaseModel], words: Sequence[str], prog: str = "ssm-dist", description: str = ""
) -> dict[str, Any]:
    """The values that `words` give, by section and key, and `config` if `--config` is among them.

    Values are typed but not checked for range; keys that are not given are absent, so that the result can
    lie over a TOML file. `--help` prints and raises SystemExit. Raises `UserError` with tyro's explanation.
    """
    explanation = io.StringIO()
    try:
        with contextlib.redirect_stderr(explanation), _unwrapped(words):
            found: dict[str, Any] = tyro.cli(
                _arguments(schema),
                prog=prog,
                description=description,
                args=list(words),
                use_underscores=True,
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_plain(explanation.getvalue())) from None
    for name, given in found.items():
        if name in schema.model_fields:
            fields = getattr(schema.model_fields[name].annotation, "model_fields", {})
            given |= {key: value == "true" for key, value in given.items() if fields[key].annotation is bool}
    return found


def _arguments(schema: type[BaseModel]) -> Any:
    """A TypedDict of TypedDicts with every key optional: tyro leaves out of those what is not given."""
    config = Annotated[Path, tyro.conf.arg(help="TOML file of the job.", help_behavior_hint="")]
    sections = {
        name: Annotated[_section(name, field.annotation), tyro.conf.arg(help=field.description)]
        for name, field in schema.model_fields.items()
    }
    return TypedDict(schema.__name__, {"config": config, **sections}, total=False)  # type: ignore[operator]


def _section(name: str, section: Any) -> Any:
    flags = {key: _flag(field) for key, field in section.model_fields.items()}
    return TypedDict(name, flags, total=False)  # type: ignore[operator]


def _flag(field: FieldInfo) -> Any:
    default = field.default if field.default not in (None, ()) else "none"
    default = str(default).lower() if field.annotation is bool else default
    hint = f"(default: {default})"
    kind: Any = Literal["true", "false"] if field.annotation is bool else _in_order(field.annotation)
    return Annotated[kind, tyro.conf.arg(help=field.description, help_behavior_hint=hint)]


def _in_order(kind: Any) -> Any:
    """`Literal[...] | None` as one Literal: tyro tells the choices of a union in an order that varies."""
    kinds = get_args(kind)
    if len(kinds) == 2 and kinds[1] is type(None) and get_origin(kinds[0]) is Literal:
        return Literal[(None, *get_args(kinds[0]))]
    return kind


@contextlib.contextmanager
def _unwrapped(words: Sequence[str]) -> Iterator[None]:
    """Let tyro explain a mistake in lines as long as they are, which no path is broken by.

    It wraps them at the width of the terminal, which stays that of --help.
    """
    before = os.environ.get("COLUMNS")
    if not {"--help", "-h"} & set(words):
        os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


def _plain(box: str) -> str:
    """Tyro's boxed explanation without the box, to be printed like every other error."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    return "\n".join(line for line in lines if line.strip("─"))
