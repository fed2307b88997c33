"""Attributes of a module by dotted path, as plans name them: "intermediate_size", "config.num_heads"."""

from __future__ import annotations

import copy
import operator
from typing import Any

from torch import nn


def has(module: nn.Module, name: str) -> bool:
    """Whether there is such an attribute."""
    try:
        find(module, name)
    except AttributeError:
        return False
    return True


def find(module: nn.Module, name: str) -> Any:
    """Its value. Raises `AttributeError`."""
    return operator.attrgetter(name)(module)


def set_own(module: nn.Module, name: str, value: Any) -> None:
    """Set it, in copies of the objects on the way, which others may share."""
    first, _, rest = name.partition(".")
    if rest:
        owner = copy.copy(getattr(module, first))
        set_own(owner, rest, value)
        value = owner
    setattr(module, first, value)
