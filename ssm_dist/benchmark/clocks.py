"""The clock and the energy of a GPU while cases run, as NVIDIA's management library (NVML) tells them.

Long products may draw all the power that a GPU is allowed. Its driver then lowers the clock, and floors,
which are of kernels alone at full clock, are out of reach. So a report says at which clock a figure was
taken.
"""

from __future__ import annotations

import ctypes
import logging
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import Self

logger = logging.getLogger(__name__)

INTERVAL = 0.05
"""Seconds from reading to reading."""
LONG_ENOUGH = 2.0
"""Seconds over which energy, which is counted in steps, tells the power."""
SM_CLOCK, POWER_CAP = 1, 0x4
"""Of NVML's interface: NVML_CLOCK_SM, and nvmlClocksEventReasonSwPowerCap."""

Span = tuple[float, float]
"""From when to when, by `time.perf_counter`."""


@dataclass(frozen=True)
class Reading:
    """What a GPU says of itself."""

    moment: float
    """By `time.perf_counter`."""
    mhz: int
    """Clock of the multiprocessors."""
    joules: float
    """Taken since the driver was loaded."""
    capped: bool
    """Whether the clock is lowered to keep to the power allowed."""


class ClockWatch:
    """Reads in a thread, from entering to leaving a `with`."""

    def __init__(self, read: Callable[[], Reading]) -> None:
        """read: tells the present; it may take a millisecond."""
        self._read = read
        self._readings: list[Reading] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="clock watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=5.0)

    def over(self, spans: Iterable[Span]) -> dict[str, Any] | None:
        """Of all readings within the spans: None where no two came within one.

        mhz: the median clock; watts: of the energy from a span's first reading to its last, or None of less
        than LONG_ENOUGH seconds in all, over which it was up to 40 % off; capped: the share of readings at
        which the driver said that power lowers the clock, which it still does for a while after it did.
        """
        found: list[Reading] = []
        seconds = joules = 0.0
        for begin, end in spans:
            within = [r for r in tuple(self._readings) if begin <= r.moment <= end]
            if len(within) > 1:
                found += within
                seconds += within[-1].moment - within[0].moment
                joules += within[-1].joules - within[0].joules
        if not found:
            return None
        return {
            "mhz": round(statistics.median(r.mhz for r in found)),
            "watts": round(joules / seconds) if seconds >= LONG_ENOUGH else None,
            "capped": round(sum(r.capped for r in found) / len(found), 3),
        }

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL):
            try:
                self._readings.append(self._read())
            except RuntimeError as error:
                logger.info("benchmark: no clocks from now on: %s", error)
                return


def clock_watch(device: torch.device) -> ClockWatch | None:
    """Of a GPU whose driver's library tells clock and energy; None elsewhere, which the log says of a GPU."""
    if device.type != "cuda":
        return None
    try:
        return ClockWatch(_reader(device))
    except (OSError, AttributeError, RuntimeError) as error:
        logger.info("benchmark: no clocks in the report, since NVML does not tell them: %s", error)
        return None


def _reader(device: torch.device) -> Callable[[], Reading]:
    """Raises OSError or AttributeError without the library or a function, RuntimeError where one refuses."""
    library = ctypes.CDLL("libnvidia-ml.so.1")
    handle, mhz = ctypes.c_void_p(), ctypes.c_uint()
    millijoules, reasons = ctypes.c_ulonglong(), ctypes.c_ulonglong()

    def ask(name: str, *arguments: Any) -> None:
        refused = getattr(library, name)(*arguments)
        if refused:
            raise RuntimeError(f"{name} returned error {refused}")

    def read() -> Reading:
        ask("nvmlDeviceGetClockInfo", handle, SM_CLOCK, ctypes.byref(mhz))
        ask("nvmlDeviceGetTotalEnergyConsumption", handle, ctypes.byref(millijoules))
        ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle, ctypes.byref(reasons))
        capped = bool(reasons.value & POWER_CAP)
        return Reading(time.perf_counter(), mhz.value, millijoules.value / 1e3, capped)

    ask("nvmlInit_v2")
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    ask("nvmlDeviceGetHandleByUUID", identity, ctypes.byref(handle))
    read()
    return read
