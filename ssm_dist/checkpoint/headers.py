"""Safetensors headers, read and checked without touching a weight.

The library raises a one-line error on a damaged file; a user needs the file, and what is wrong in bytes. So
the few rules of the format are checked here first (https://github.com/huggingface/safetensors#format): eight
bytes with the header's length, a JSON header, then the data, which the tensors cover.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The stored dtypes that can be loaded."""

_MAX_HEADER = 100_000_000  # the library's own limit, in bytes


class DamagedFile(Exception):
    """A file that is not a whole safetensors file; the message says why, and names it."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, as its header describes it."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    """Where its data are, in bytes from the start of the file's data."""


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file. Raises DamagedFile if the file is truncated or malformed."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if prefix.startswith(b"version "):
            raise DamagedFile(f"{file.name} is a git-lfs pointer, not the weights: run `git lfs pull` there")
        if len(prefix) < 8:
            raise DamagedFile(f"{file.name} is truncated: {size} bytes, not even a header's length")
        length = int.from_bytes(prefix, "little")
        if length > _MAX_HEADER:
            raise DamagedFile(f"{file.name} is not a safetensors file (its header would be {length} bytes)")
        if size < 8 + length:
            raise DamagedFile(f"{file.name} is truncated: {size} bytes, its header alone needs {8 + length}")
        header = _parsed(file, stream.read(length))
    tensors = {name: _tensor(file, name, entry) for name, entry in header.items() if name != "__metadata__"}
    end = 8 + length + max((tensor.end for tensor in tensors.values()), default=0)
    if size < end:
        raise DamagedFile(f"{file.name} is truncated: {size} bytes of {end}; download it again")
    if size > end:
        raise DamagedFile(f"{file.name} has {size} bytes where its header describes {end}; download it again")
    return tensors


def _parsed(file: Path, header: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(header)
    except ValueError as error:
        raise DamagedFile(f"{file.name} has a malformed header: {error}") from None
    if not isinstance(parsed, dict):
        raise DamagedFile(f"{file.name} has a malformed header: not a table of tensors")
    return parsed


def _tensor(file: Path, name: str, entry: Any) -> StoredTensor:
    try:
        begin, end = (int(offset) for offset in entry["data_offsets"])
        tensor = StoredTensor(
            file, name, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), begin, end
        )
    except (TypeError, KeyError, ValueError):
        raise DamagedFile(f"{file.name} has a malformed header at tensor {name}") from None
    size = DTYPES[tensor.dtype].itemsize * math.prod(tensor.shape) if tensor.dtype in DTYPES else end - begin
    if begin < 0 or end - begin != size:
        raise DamagedFile(f"{file.name} has a malformed header: {name} takes {size} bytes, not {end - begin}")
    return tensor
