"""How a job's configuration is read: defaults, under a TOML file, under the words of the command line.

What is wrong with it is one line a mistake, which names the source and the nearest valid key.
"""

from __future__ import annotations

import reprlib
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ssm_dist.config import ALTERNATIVES, Config
from ssm_dist.errors import UserError, nearest
from ssm_dist.flags import read_flags

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_ACCEPTED = {"tuple_type": "it must be a list", "path_type": "it must be a path, as a string"}


def load_config(path: Path | None, overrides: list[str], schema: type[Config] = Config) -> Config:
    """Defaults, under the TOML file `path` if any, under the `--section.key value` words of `overrides`.

    A subclass of `Config` as `schema` adds sections of its own. Raises `UserError`, one line a mistake.
    """
    flags = read_flags(schema, overrides)
    return build_config(flags.pop("config", path), flags, schema)


def build_config(
    path: Path | None,
    flags: dict[str, dict[str, Any]],
    schema: type[Config] = Config,
    given_by: str = "command line",
) -> Config:
    """As `load_config`, with what is given besides the file already read into sections of keys.

    given_by: who gave them, for messages.
    """
    table = {} if path is None else _read_toml(path)
    layers: dict[str, Any] = {"model": {}, **table}
    for section, given in flags.items():
        below = layers.get(section, {})
        if isinstance(below, dict):
            layers[section] = _without_alternatives(section, below, given) | given
    try:
        return schema.model_validate(layers)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        mistakes = [_explain(schema, mistake, path, flags, given_by) for mistake in errors]
        raise UserError("\n".join(mistakes)) from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def _without_alternatives(section: str, below: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A preset on the command line replaces the file's checkpoint, instead of contradicting it."""
    pair = ALTERNATIVES.get(section, ())
    return {key: value for key, value in below.items() if not (key in pair and given.keys() & set(pair))}


def _explain(
    schema: type[Config], mistake: ErrorDetails, path: Path | None, flags: dict[str, Any], given_by: str
) -> str:
    section, key = (str(part) for part in (*mistake["loc"], "", "")[:2])
    name = f"{section}.{key}" if key else section
    given = flags.get(section, {}).keys()
    beside_file = key in given if key else bool(given & set(ALTERNATIVES.get(section, ())))
    source = path if path and not beside_file else given_by
    if mistake["type"] == "extra_forbidden" and not key and isinstance(mistake["input"], dict):
        close = nearest(section, schema.model_fields)
        return f"{source}: unknown section [{section}]; the nearest valid one is [{close}]"
    if mistake["type"] == "extra_forbidden":
        return f"{source}: unknown key {name}; the nearest valid one is {_nearest(schema, name)}"
    if mistake["type"] == "value_error" and not key:
        return f"{source}: {mistake['ctx']['error']}"
    if mistake["type"] == "model_type":
        return f"{path}: {name} = {mistake['input']!r} is not a section; write [{name}] and its keys below it"
    accepted = _ACCEPTED.get(mistake["type"]) or mistake["msg"].replace("Input should be", "it must be")
    return f"{source}: {name} = {reprlib.repr(mistake['input'])}: {accepted.removeprefix('Value error, ')}"


def _nearest(schema: type[Config], name: str) -> str:
    """The valid name most like `name`; a key that another section has wins."""
    sections: dict[str, Any] = {key: field.annotation for key, field in schema.model_fields.items()}
    keys = [f"{section}.{key}" for section, kind in sections.items() for key in kind.model_fields]
    same_key = [known for known in keys if known.split(".")[1] == name.split(".")[-1]]
    candidates = same_key or (keys if "." in name else [*sections, *keys])
    return nearest(name, candidates)
