"""Steps captured in CUDA graphs, one for each shape of their inputs, and replayed on new inputs.

A captured step reads its inputs from a buffer of its own and leaves its results in place, until the next
replay of any graph: all share one pool of memory. Whoever keeps results copies them, on the same stream.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Function = Callable[[Tensor], Any]

MOST_GRAPHS = 128
"""Graphs held at a time; the one unused for longest gives way."""


@dataclass
class Captured:
    """One step, ready to be replayed."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    results: Any
    numbers: Tensor
    """What `inputs` holds, in host memory."""


class Graphs:
    """The captured steps of one model. Ranks that make the same calls capture the same steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._captured: dict[Hashable, Captured] = {}
        self._seen: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._captured)

    def run(
        self, key: Hashable, function: Function, numbers: Tensor, idle: Callable[[], Tensor],
        *, lazy: bool = False,
    ) -> Any:  # fmt: skip
        """`function` of numbers that are in host memory, from a graph; the results hold until the next call.

        key: whatever the work depends on besides the numbers. idle: makes numbers of the same shape for which
        the function changes nothing that matters; the step is tried out with them before it is captured.
        lazy: the first call with a key runs without a graph, which pays only for steps that come again; and
        numbers that come again are not looked for.
        """
        if lazy and key not in self._seen:
            self._seen.add(key)
            return function(self._to_device(numbers))
        entry = self._captured.pop(key, None) or self._capture(function, idle())
        self._captured[key] = entry  # the newest comes last
        if lazy or not torch.equal(entry.numbers, numbers):
            entry.inputs.copy_(numbers, non_blocking=True)
            entry.numbers = numbers
        entry.graph.replay()
        return entry.results

    def _capture(self, function: Function, idle: Tensor) -> Captured:
        if len(self._captured) == MOST_GRAPHS:
            torch.cuda.synchronize(self._device)
            del self._captured[next(iter(self._captured))]
        inputs = self._to_device(idle)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            function(inputs)  # compiles kernels, opens communicators
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # other threads, NCCL's watchdog among them, may go on calling CUDA
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            results = function(inputs)
        return Captured(graph, inputs, results, idle)

    def _to_device(self, numbers: Tensor) -> Tensor:
        return numbers.to(self._device, non_blocking=True)


def bucket(count: int, most: int, parts: int, least: int = 1) -> int:
    """The size, at most `most`, that `count` is padded to: one of `parts` between two powers of two.

    Sizes are `least` apart at least.
    """
    step = max(least, (1 << (count.bit_length() - 1)) // parts)
    return min(-(-count // step) * step, most)


def buckets(most: int, parts: int) -> list[int]:
    """All sizes of `bucket`, rising."""
    return sorted({bucket(count, most, parts) for count in range(1, most + 1)})
