"""Times calls on a device, and measures its ceilings."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]

MEMORY_CLOCK_KHZ, MEMORY_WIDTH_BITS = 36, 37
"""Attributes of a device by their numbers in CUDA's driver interface."""
REPEATS = 7
LONG_ENOUGH = 4e-3
"""Seconds that one timed stretch lasts at least."""


class Clock:
    """Seconds of calls on one device, and its ceilings."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gpu = device.type == "cuda"
        self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if self.gpu else 0

    def seconds(self, calls: list[Call]) -> float:
        """A pass over the calls divided by their number: captured and replayed on a GPU, plain on a CPU."""
        for call in calls[:2]:
            call()
        one_pass = self._captured(calls) if self.gpu else lambda: [call() for call in calls]
        passes = max(1, round(LONG_ENOUGH / max(self._stretch(one_pass, 1), 1e-7)))
        stretches = [self._stretch(one_pass, passes) for _ in range(REPEATS if self.gpu else 1)]
        return statistics.median(stretches) / passes / len(calls)

    def eagerly(self, call: Call) -> float:
        """One call outside any graph, best of two after one more."""
        call()
        return min(self._stretch(call, 1) for _ in range(2))

    def _captured(self, calls: list[Call]) -> Call:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        return graph.replay

    def _stretch(self, call: Call, passes: int) -> float:
        if not self.gpu:
            start = time.perf_counter()
            for _ in range(passes):
                call()
            return time.perf_counter() - start
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(passes):
            call()
        events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1]) / 1e3

    def copy_rate(self) -> float:
        """Bytes/s read and written by a copy of 1 GiB: the driver's or a kernel's, whichever is faster."""
        numbers = torch.randint(1 << 30, (2, 1 << 28), device=self.device, dtype=torch.int32)
        driver = self.seconds([lambda: numbers[1].copy_(numbers[0])])
        kernel = self.seconds([lambda: torch.add(numbers[0], 1, out=numbers[1])])
        return numbers.nbytes / min(driver, kernel)

    def nominal_rate(self) -> float | None:
        """Bytes/s that the memory's clock and width allow, which no copy reaches; None on a CPU."""
        if not self.gpu:
            return None
        driver, number = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        found = []
        for attribute in (MEMORY_CLOCK_KHZ, MEMORY_WIDTH_BITS):
            if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, torch.cuda.current_device()):
                return None
            found.append(number.value)
        return 2 * 1e3 * found[0] * found[1] / 8  # two transfers a cycle

    def ceilings(self) -> dict[str, float]:
        """Bytes/s of a copy, operations/s of a bf16 product, special functions/s; not measured on a CPU."""
        if not self.gpu:
            return {}
        n = 8192
        a, b = torch.randn(2, n, n, device=self.device, dtype=torch.bfloat16)
        product = torch.empty_like(a)
        multiplied = 2 * n**3 / self.seconds([lambda: torch.mm(a, b, out=product)])
        properties = torch.cuda.get_device_properties(self.device)
        clock_hz = 1e3 * getattr(properties, "clock_rate", 1_980_000)
        special = 16 * clock_hz * properties.multi_processor_count
        return {"bytes": self.copy_rate(), "flops": multiplied, "special": special}
