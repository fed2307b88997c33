"""The one place where an op's implementation is chosen.

Every op has a definition in plain torch (`reference`); other backends register themselves beside it. The
choice is made once, by configuration, for the whole process, so that all ranks run the same code.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

from ssm_dist.errors import UserError

BackendName = Literal["auto", "reference", "triton", "mamba_ssm"]

logger = logging.getLogger(__name__)
_implementations: dict[str, dict[str, Callable[..., Any]]] = {}
_selected: BackendName = "auto"


def register(op: str, backend: BackendName) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: `fn` implements `op` in `backend`."""

    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        _implementations.setdefault(op, {})[backend] = fn
        return fn

    return add


def available() -> list[str]:
    """Backends that implement every op."""
    names = [name for name in get_args(BackendName) if name != "auto"]
    return [name for name in names if all(name in table for table in _implementations.values())]


def select(name: BackendName) -> str:
    """Choose the backend of all ops for this process; returns the name of the one that will run.

    Raises `UserError` when the backend does not exist here.
    """
    global _selected
    if name != "auto" and name not in available():
        raise UserError(f"[kernels] backend = {name!r} is not available here; choose auto or one of {available()}")
    _selected = name
    logger.info("kernels: %s", resolved())
    return resolved()


def resolved() -> str:
    """The backend that `auto` stands for at the moment, or the selected one."""
    return available()[-1] if _selected == "auto" else _selected


@contextlib.contextmanager
def using(name: BackendName) -> Iterator[None]:
    """Run a block with another backend (tests and benchmarks)."""
    global _selected
    previous = _selected
    select(name)
    try:
        yield
    finally:
        _selected = previous


def implementation(op: str) -> Callable[..., Any]:
    """The function that implements `op` in the selected backend."""
    return _implementations[op][resolved()]
