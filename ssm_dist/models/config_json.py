"""The values of a parsed config.json, each checked as it is read; what is wrong with one is said one way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from ssm_dist.errors import UserError

LARGEST = 1 << 20
"""Of any size: above all that models have, and below what overflows when a tensor's sizes are multiplied."""

_SHOWN = 60  # characters of a value


class ConfigJson:
    """Reads values by key, or raises `UserError` with the key, the value and what it must be.

    A key that is absent has the default; without a default it has to be there. null is a value like others.
    """

    def __init__(self, raw: Mapping[str, Any], section: str = "") -> None:
        """raw: the parsed object; section: the key that it is the value of, "" for the whole file."""
        self._raw = raw
        self._prefix = f"{section}." if section else ""

    def __contains__(self, key: str) -> bool:
        return key in self._raw

    def get(self, key: str) -> Any:
        """The value as it is, unchecked; None where it is absent."""
        return self._raw.get(key)

    def refuse(self, key: str, wanted: str) -> NoReturn:
        """Say that the key's value must be `wanted`."""
        shown = json.dumps(self._raw.get(key))
        if len(shown) > _SHOWN:
            shown = f"{shown[:_SHOWN]}..."
        raise UserError(f"config.json: {self._prefix}{key} = {shown}: must be {wanted}")

    def size(self, key: str, default: int | None = None, least: int = 1) -> int:
        """An integer from `least` to LARGEST."""
        value = self._value(key, default)
        if not _is_size(value, least):
            self.refuse(key, f"an integer from {least} to {LARGEST}")
        return int(value)

    def size_or_auto(self, key: str, automatic: int) -> int:
        """An integer from 1 to LARGEST, or "auto", the default, which stands for `automatic`."""
        value = self._value(key, "auto")
        if value == "auto":
            return automatic
        if not _is_size(value):
            self.refuse(key, f'"auto" or an integer from 1 to {LARGEST}')
        return int(value)

    def multiple(self, key: str, of: int, default: int) -> int:
        """`of` times the value, which is a number, rounded down; from 1 to LARGEST."""
        value = self._value(key, default)
        if not _is_number(value) or not 1 <= value * of <= LARGEST:
            self.refuse(key, f"a number that is from 1 to {LARGEST} when multiplied by {of}")
        return int(value * of)

    def epsilon(self, key: str, default: float) -> float:
        """A number from 0 to 1."""
        value = self._value(key, default)
        if not _is_number(value) or not 0 <= value <= 1:
            self.refuse(key, "a number from 0 to 1")
        return float(value)

    def switch(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._value(key, default)
        if not isinstance(value, str):
            self.refuse(key, "a string")
        return value

    def section(self, key: str) -> ConfigJson:
        """An object, whose values are read in the same way; empty where it is absent or null."""
        value = self._raw.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, "an object")
        return ConfigJson(value or {}, self._prefix + key)

    def require(self, key: str, supported: str) -> None:
        """Refuse all but one value, as of an activation that the kernels fuse; it is the default."""
        if self._value(key, supported) != supported:
            self.refuse(key, f"{json.dumps(supported)}, the only one that is supported")

    def _value(self, key: str, default: Any) -> Any:
        if key in self._raw:
            return self._raw[key]
        if default is None:
            raise UserError(f"config.json lacks {self._prefix + key!r}")
        return default


def _is_size(value: Any, least: int = 1) -> bool:
    return type(value) is int and least <= value <= LARGEST  # which a bool is not


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
