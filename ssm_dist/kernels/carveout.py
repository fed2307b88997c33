"""Kernels that are to run beside each other on a multiprocessor.

A multiprocessor has one memory for its L1 cache and for shared memory, and changes their sizes only when it
is idle. By default the driver gives a kernel that uses little shared memory a large cache; a kernel that
needs more shared memory then waits for its end, whatever registers are free. Triton has no option for it.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any

logger = logging.getLogger(__name__)

_PREFERRED_CARVEOUT = 9
"""CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT of the CUDA driver's interface; in per cent."""

_prepared: set[int] = set()


def let_others_beside(launched: Any) -> None:
    """From its next launch on, a compiled Triton kernel asks for the smallest cache; once is enough.

    launched: what `kernel[grid](...)` returns; under the interpreter, nothing.
    """
    function = getattr(launched, "function", None)
    if function is None or function in _prepared:
        return
    _prepared.add(function)
    refused = _driver().cuFuncSetAttribute(ctypes.c_void_p(function), _PREFERRED_CARVEOUT, 100)
    if refused:
        logger.info("kernels: the driver keeps its size of the L1 cache (error %d), less overlaps", refused)


@functools.cache
def _driver() -> ctypes.CDLL:
    """The CUDA driver's library, which is loaded wherever a kernel has run."""
    return ctypes.CDLL("libcuda.so.1")
