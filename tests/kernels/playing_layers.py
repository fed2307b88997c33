"""The kernels of `decode_layers`, played in Python for the words that their programs send and wait for.

Addresses come from the kernels' own code, with torch's tensors in the place of Gluon's. Where no address
depends on it, there is nothing to find out: it is `Whatever`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import FunctionType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.runtime.jit import JITFunction

PLAYED = ("_work", "_work_few", "send", "receive", "receive_wide", "_take", "sums_of_round")
"""Functions that send or wait, or whose result has parts."""


class Whatever:
    """What is no address: whatever is done with it gives the same."""

    def __call__(self, *_: Any, **__: Any) -> Whatever:
        return self

    def __getattr__(self, _: str) -> Whatever:
        return self

    @classmethod
    def __torch_function__(cls, *_: Any) -> Whatever:
        return cls()

    __getitem__ = __neg__ = __add__ = __sub__ = __mul__ = __floordiv__ = __lt__ = __call__
    __radd__ = __rsub__ = __rmul__ = __call__


class Language:
    """In the place of `gluon.language`."""

    int32, int64, static_range = torch.int32, torch.int64, range
    program = torch.tensor(0)

    def __getattr__(self, _: str) -> Whatever:
        return Whatever()

    def program_id(self, _axis: int) -> Tensor:
        return self.program

    def arange(self, begin: int, end: int, _layout: Any) -> Tensor:
        return torch.arange(begin, end)

    def minimum(self, a: Tensor | int, b: Tensor | int) -> Tensor:
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))

    def where(self, *given: Any) -> Any:
        return torch.where(*given)

    def load(self, at: Any, **_: Any) -> Any:
        """Of the counters 0: the first tag."""
        return at if isinstance(at, Whatever) else torch.tensor(0)

    def warp_specialize(self, parts: Any, *_: Any) -> None:
        work, given = parts[0]
        work(*given)


class Played:
    """In the place of a kernel; what all programs of all its launches send and wait for."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.language = kernel, Language()
        self.sent: dict[int, list[Tensor]] = defaultdict(list)
        """By tag: the addresses of words, as often as they are sent."""
        self.awaited: dict[int, list[Tensor]] = defaultdict(list)
        """By tag: the addresses of words, at least once."""
        self._globals: dict[int, dict[str, Any]] = {}
        self._labels: list[tuple[bool, int, int]] = []
        self._places: list[tuple[Tensor, Tensor]] = []

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda **given: self._launch(torch.arange(*grid), given)

    def _launch(self, programs: Tensor, given: dict[str, Any]) -> None:
        known = {k: v for k, v in given.items() if k in self.kernel.arg_names}
        known |= {k: Whatever() for k, v in known.items() if isinstance(v, Tensor) or k == "limit"}

        def one(program: Tensor) -> list[tuple[Tensor, Tensor]]:
            self._labels, self._places, self.language.program = [], [], program
            self._plain(self.kernel)(**{**known, "counters": 0})
            return self._places

        # All programs at once: branches on their numbers are taken, in which nobody sends or waits.
        with mock.patch.object(Tensor, "__bool__", lambda _: True):
            places = torch.vmap(one)(programs)
        for (sent, tag, words), (first, wanted) in zip(self._labels, places, strict=True):
            firsts = first[wanted] if sent else first[wanted].unique()
            addresses = (firsts[:, None] + 4 * torch.arange(words)).flatten()
            (self.sent if sent else self.awaited)[tag].append(addresses)

    def _plain(self, function: Any) -> Callable[..., Any]:
        """A Gluon function as one of Python, and so those that it calls."""
        names = function.fn.__globals__
        if id(names) not in self._globals:
            stand_ins = self._globals[id(names)] = {}
            stand_ins |= {name: self._stand_in(name, value) for name, value in names.items()}
        return FunctionType(function.fn.__code__, self._globals[id(names)])

    def _stand_in(self, name: str, value: Any) -> Any:
        if value is gl:
            return self.language
        if isinstance(value, gl.constexpr):
            return value.value
        if isinstance(value, JITFunction):
            return self._plain(value) if name in PLAYED else getattr(self, name, Whatever())
        return Whatever() if getattr(value, "__triton_builtin__", False) else value

    def _note(self, sent: bool, first: Tensor, tag: Tensor, wanted: Tensor | bool, words: int) -> Whatever:
        self._labels.append((sent, int(tag), words))
        self._places.append(torch.broadcast_tensors(first, torch.as_tensor(wanted)))
        return Whatever()

    # The functions of `gluon_words`, which say what they send and wait for.

    def publish(self, address: Tensor, _value: Any, tag: Tensor, wanted: Tensor, _scope: str) -> None:
        self._note(True, address, tag, wanted, 1)

    def publish_wide(self, address: Tensor, _value: Any, tag: Tensor, wanted: Tensor, _scope: str) -> None:
        self._note(True, address, tag, wanted, 2)

    def publish_wides(self, address: Tensor, _first: Any, _second: Any, tag: Tensor, wanted: Tensor) -> None:
        self._note(True, address, tag, wanted, 4)

    def poll(
        self, address: Tensor, distance: int, tag: Tensor, _waits: Any, _code: Any, width: int, ranks: int,
        _scope: str,
    ) -> Whatever:  # fmt: skip
        first = address + distance * torch.arange(ranks)
        return self._note(False, first, tag, True, -(-width // 4) * 4)

    def poll_wide(self, address: Tensor, tag: Tensor, _waits: Any, _code: Any, count: int) -> Whatever:
        return self._note(False, address, tag, True, 2 * count)

    def poll_sources(
        self, address: Tensor, distance: int, wanted: Tensor, tag: Tensor, _waits: Any, _code: Any,
        ranks: int, parts: int, _scope: str,
    ) -> Whatever:  # fmt: skip
        first = address[:, None] + distance * torch.arange(ranks * parts)
        return self._note(False, first, tag, wanted[:, None], 2)
