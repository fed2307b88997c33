"""Tensor maps of the CUDA driver: how tensor copies find the boxes of a matrix (sm_90).

Triton passes one as a kernel's argument; a kernel of many layers finds those of their weights in memory.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

MAP_BYTES = 128
_BFLOAT16, _SWIZZLED_BY_128, _PROMOTED_TO_256, _NEITHER = 9, 3, 3, 0
"""Of the driver's interface: CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, ..._SWIZZLE_128B, ..._L2_PROMOTION_L2_256B."""


def tensor_map(address: int, rows: int, columns: int, box_rows: int) -> bytes:
    """That of a contiguous bfloat16 matrix at an address, in boxes of 64 columns, swizzled by 128 bytes.

    Raises RuntimeError where the driver refuses: the address and the width in bytes must divide by 16.
    """
    room = ctypes.create_string_buffer(2 * MAP_BYTES)
    begin = -ctypes.addressof(room) % 64
    sizes, strides = (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(2 * columns)
    box, steps = (ctypes.c_uint32 * 2)(64, box_rows), (ctypes.c_uint32 * 2)(1, 1)
    refused = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(room) + begin), _BFLOAT16, 2, ctypes.c_void_p(address), sizes,
        strides, box, steps, _NEITHER, _SWIZZLED_BY_128, _PROMOTED_TO_256, _NEITHER,
    )  # fmt: skip
    if refused:
        raise RuntimeError(f"the CUDA driver makes no tensor map of {rows} x {columns} numbers (error {refused})")
    return room.raw[begin : begin + MAP_BYTES]


def in_memory(maps: list[bytes], device: torch.device) -> Tensor:
    """Tensor maps one after another in a device's memory, (n, 128) bytes; its address divides by 64."""
    return torch.frombuffer(bytearray(b"".join(maps)), dtype=torch.uint8).view(-1, MAP_BYTES).to(device)


@functools.cache
def _driver() -> ctypes.CDLL:
    """The CUDA driver's library, which is loaded wherever CUDA has started."""
    return ctypes.CDLL("libcuda.so.1")
