"""Chat templates: Jinja from the checkpoint, rendered in a sandbox with the names that such templates use."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ssm_dist.errors import UserError


class _Generation(Extension):
    """`{% generation %}` marks an assistant's words for training; in inference its body is just shown."""

    tags = {"generation"}  # noqa: RUF012 (declared as an instance variable by the base class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def render_chat(
    template: str, messages: Sequence[Mapping[str, object]], special_tokens: Mapping[str, str]
) -> str:
    """The prompt that the template makes of these messages, up to where the assistant's answer begins.

    `special_tokens` are seen by the template under their names (`bos_token`, ...). Raises UserError for
    messages that are not JSON, or that the template refuses.
    """
    try:
        plain = json.loads(
            json.dumps(list(messages))
        )  # no objects with methods for a foreign template to call
    except (TypeError, ValueError) as error:
        raise UserError(f"`messages` must be a list of JSON objects: {error}") from error
    if not plain or not all(isinstance(message, dict) and "role" in message for message in plain):
        raise UserError(
            "`messages` must be a list of at least one object with a role, as {'role': ..., 'content': ...}"
        )
    try:
        return _compiled(template).render(messages=plain, add_generation_prompt=True, **special_tokens)
    except Exception as error:  # the template is foreign code: whatever it raises is its refusal
        raise UserError(f"the checkpoint's chat template cannot render these messages: {error}") from error
