"""Reading a checkpoint into a model whose parameters are still placeholders on the meta device."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ssm_dist.checkpoint.folder import Checkpoint, Stored
from ssm_dist.checkpoint.headers import DTYPES, StoredTensor
from ssm_dist.checkpoint.layouts import Layout, Source
from ssm_dist.checkpoint.parameters import Held, held, replace_parameters
from ssm_dist.checkpoint.progress import byte_progress
from ssm_dist.checkpoint.weights import WeightMap, parameter_dtype
from ssm_dist.errors import UserError

_WINDOW = 64 << 20
"""Bytes of a file's tensors that are mapped into memory before the file is opened anew.

A mapping counts all pages ever touched as this process's memory; reopening lets go of them.
"""


def resolve_dtype(requested: str, checkpoint: Checkpoint) -> torch.dtype:
    """The model's dtype: `requested`, or for "auto" the one that config.json names, or the one most stored.

    float64 becomes float32, the widest that the kernels are written for. Raises UserError if config.json
    names a dtype that no model runs in.
    """
    if requested == "auto":
        config = checkpoint.config
        requested = str(config.get("dtype") or config.get("torch_dtype") or _most_stored(checkpoint))
    dtype = {str(known): known for known in DTYPES.values()}.get("torch." + requested.removeprefix("torch."))
    if dtype is None:
        raise UserError(
            f"config.json: dtype {requested!r} is not supported; set model.dtype to bfloat16 or float32"
        )
    return torch.float32 if dtype == torch.float64 else dtype


def load_parameters(
    model: nn.Module,
    checkpoint: Checkpoint,
    weights: WeightMap,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    progress: bool = False,
) -> None:
    """Replace the meta parameters of `model` by this rank's slices of the checkpoint, on `device`.

    A parameter that is a DTensor stays one; only the bytes of this rank's shard are read from the file. All
    become `dtype`, except those that `parameter_dtype` keeps in float32. `progress` shows how far it is (one
    rank should). Raises UserError if the checkpoint does not fit the model, before anything is allocated, and
    later if a parameter is stored more than once and its copies differ.
    """
    parameters = dict(model.named_parameters())
    stored = checkpoint.validate(weights, {path: tuple(p.shape) for path, p in parameters.items()})
    parts = {path: held(parameter) for path, parameter in parameters.items()}
    local: dict[str, Tensor] = {}
    total = sum(_share(parts[path], stored[path]) for path in parameters)
    with byte_progress("Weights read by rank 0", total, progress) as advance, _Reader(device) as reader:
        for path in sorted(
            parameters, key=lambda path: (stored[path].tensor.file, stored[path].tensor.begin)
        ):
            part, place = parts[path], stored[path]
            local[path] = torch.empty(part.local_shape, dtype=parameter_dtype(path, dtype), device=device)
            local[path].copy_(reader.read(place.tensor, place.layout, part))
            for copy in place.copies:
                _check_copy(copy, place, reader.read(copy, place.layout, part).to(local[path]), local[path])
            advance(_share(part, place))
    replace_parameters(model, local)


class _Reader:
    """Reads slices of safetensors files, with one file open at a time."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = str(device)
        self.file: Path | None = None
        self.opened: Any = None
        self.touched = 0

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.opened = None

    def read(self, tensor: StoredTensor, layout: Layout, part: Held) -> Tensor:
        """One parameter's part, on the device, in the stored dtype; it may be a view of the open file."""
        try:
            return layout.read(self._source(tensor), part.dim, part.start, part.length)
        except SafetensorError as error:
            raise UserError(f"{tensor.file} cannot be read: {error}") from None

    def _source(self, tensor: StoredTensor) -> Source:
        if tensor.file != self.file or self.touched > _WINDOW:
            self.opened = None  # unmap the old before mapping the new
            self.opened = safe_open(tensor.file, framework="pt", device=self.device)
            self.file, self.touched = tensor.file, 0
        self.touched += tensor.end - tensor.begin
        source: Source = self.opened.get_slice(tensor.name)
        return source


def _check_copy(copy: StoredTensor, place: Stored, read: Tensor, local: Tensor) -> None:
    if not torch.equal(read, local):
        raise UserError(
            f"{copy.file.parent} holds {copy.name} and {place.tensor.name}, which are one parameter of this "
            "model, with different values. If the head is meant to have weights of its own, set "
            '"tie_word_embeddings": false in config.json'
        )


def _share(part: Held, place: Stored) -> int:
    """Bytes of the file that a part is."""
    return (
        (place.tensor.end - place.tensor.begin)
        * torch.Size(part.local_shape).numel()
        // torch.Size(part.shape).numel()
    )


def _most_stored(checkpoint: Checkpoint) -> str:
    """The name of the dtype that most bytes of the checkpoint are in."""
    count: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        count[tensor.dtype] += tensor.end - tensor.begin
    name = max(count, key=count.__getitem__, default="F32")  # none at all is for `validate` to report
    return str(DTYPES.get(name, name))
