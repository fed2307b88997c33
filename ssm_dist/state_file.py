"""The file of a saved state: safetensors, the same whatever the tensor-parallel degree it was saved under.

    token_ids (n,) int64                        everything said so far
    conv      (layers, conv_width - 1, d_inner) after the first n - 1 tokens, as are all states:
    ssm       (layers, d_inner, d_state)        the last token is what a model computes first when it resumes
    kv        (sites, 2, n - 1, heads, head_dim)   of hybrid models

and, in the header's metadata, what `StateInfo` has.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssm_dist.checkpoint.headers import DamagedFile, read_header
from ssm_dist.errors import UserError
from ssm_dist.places import check_file

FORMAT = "ssm-dist state 1"


@dataclass(frozen=True)
class StateInfo:
    """What a file says of itself."""

    model_type: str
    fingerprint: str
    """Of the model's sizes and weights."""
    dtype: str
    """Of the convolution's inputs, keys and values."""
    state_dtype: str
    """Of the scan's states."""
    history: str
    """SHA-256 of the token ids, as little-endian int64."""


def history_hash(token_ids: list[int]) -> str:
    """SHA-256 of token ids, as little-endian int64."""
    return hashlib.sha256(b"".join(i.to_bytes(8, "little") for i in token_ids)).hexdigest()


def write_state(file: Path, info: StateInfo, tensors: dict[str, Tensor]) -> None:
    """Write whole tensors (see the head of this file); the file appears when it is complete.

    Raises `UserError` when it cannot be written.
    """
    check_file(file, f"cannot write {file}", replaced=True)
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        save_file(tensors, partial, metadata={"format": FORMAT, **asdict(info)})
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {file}: {error}") from None


def inspect_state(file: Path) -> tuple[StateInfo, list[int], dict[str, tuple[int, ...]]]:
    """What a file says of itself, its token ids, and the shapes of its tensors.

    Raises `UserError` when it is not a whole file of a saved state.
    """
    try:
        header = read_header(file)
        with safe_open(str(file), framework="pt") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise DamagedFile(f"it is not a file of `state save` ({FORMAT})")
            token_ids = stored.get_tensor("token_ids").tolist()
        info = StateInfo(**{field.name: metadata[field.name] for field in fields(StateInfo)})
    except OSError as error:
        raise UserError(f"cannot read the state {file}: {error.strerror or error}") from None
    except (DamagedFile, KeyError) as error:
        raise UserError(f"cannot use the state {file}: {error}") from None
    if history_hash(token_ids) != info.history:
        raise UserError(f"cannot use the state {file}: its token ids are not those that it was saved with")
    return info, token_ids, {name: tensor.shape for name, tensor in header.items()}


def read_part(file: Path, channels: tuple[int, int], heads: tuple[int, int]) -> dict[str, Tensor]:
    """conv, ssm and kv of a range of channels and a range of attention heads."""
    (first, last), (low, high) = channels, heads
    with safe_open(str(file), framework="pt") as stored:
        return {
            "conv": stored.get_slice("conv")[:, :, first:last].contiguous(),
            "ssm": stored.get_slice("ssm")[:, first:last].contiguous(),
            "kv": stored.get_slice("kv")[:, :, :, low:high].contiguous()
            if stored.get_slice("kv").get_shape()[0]
            else torch.empty(0),
        }
