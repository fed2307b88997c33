"""Writing a sharded model as a Hugging Face folder that transformers loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ssm_dist.checkpoint.folder import INDEX, SINGLE
from ssm_dist.checkpoint.hub import TOKENIZER_FILES
from ssm_dist.checkpoint.layouts import Layout
from ssm_dist.checkpoint.weights import WeightMap
from ssm_dist.errors import UserError
from ssm_dist.parallel import ParameterPlacement


@dataclass(frozen=True)
class _Item:
    """One tensor to write."""

    name: str
    layout: Layout
    placement: ParameterPlacement
    parameter: nn.Parameter

    @property
    def nbytes(self) -> int:
        return self.parameter.dtype.itemsize * torch.Size(self.placement.shape).numel()


def save_huggingface(
    model: nn.Module,
    placements: Sequence[ParameterPlacement],
    weights: WeightMap,
    config: Mapping[str, Any],
    folder: str | Path,
    *,
    mesh: DeviceMesh | None = None,
    tokenizer_source: Path | None = None,
    max_shard_bytes: int = 4 << 30,
) -> None:
    """Write `model` to `folder` as safetensors, config.json and tokenizer files, as save_pretrained would.

    Collective: every rank of `mesh` calls it (None: the model is in one process), the first one writes. The
    parameters may be localised or DTensors; they are gathered one by one by their `placements`, and the host
    memory needed is one file of at most `max_shard_bytes` (or one tensor). config: the fields of config.json,
    to which the dtype is added. Tied weights are written once. The folder appears when it is complete. Raises
    UserError if it exists and is not empty, or the disk is too full.
    """
    folder = Path(folder).absolute()
    items = _items(model, placements, weights)
    files = _files(items, max_shard_bytes)
    writes = mesh is None or mesh.get_local_rank() == 0
    _check_target(folder, sum(item.nbytes for item in items))
    if writes:
        with _appearing_whole(folder) as partial:
            _write_tensors(partial, files, mesh)
            dtype = str(model.get_parameter("embedding.weight").dtype).removeprefix("torch.")
            _write_json(partial / "config.json", {**config, "dtype": dtype})
            if tokenizer_source is not None:
                _copy_tokenizer(tokenizer_source, partial)
    else:
        for item in (item for group in files.values() for item in group):
            _whole(item, mesh)
    if mesh is not None:
        dist.barrier(mesh.get_group())


def _items(model: nn.Module, placements: Sequence[ParameterPlacement], weights: WeightMap) -> list[_Item]:
    """What to write; a tied head has a placement of its own, but no entry in the weight map."""
    entries = ((placement, weights.entries.get(placement.path)) for placement in placements)
    return [
        _Item(name, entry.layout, placement, model.get_parameter(placement.path))
        for placement, entry in entries
        if entry is not None
        for name in entry.names[: entry.written]
    ]


def _files(items: list[_Item], max_bytes: int) -> dict[str, list[_Item]]:
    """Which tensors go to which file, in the order of the model."""
    groups: list[list[_Item]] = [[]]
    for item in items:
        if groups[-1] and sum(other.nbytes for other in groups[-1]) + item.nbytes > max_bytes:
            groups.append([])
        groups[-1].append(item)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, start=1)}


def _check_target(folder: Path, nbytes: int) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; save to a new one")
    parent = next(path for path in folder.parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise UserError(f"{parent} has {free / 2**30:.1f} GiB free; the model takes {nbytes / 2**30:.1f} GiB")


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place at the end, or vanishes on an error."""
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _write_tensors(folder: Path, files: Mapping[str, list[_Item]], mesh: DeviceMesh | None) -> None:
    for file, group in files.items():
        tensors = {item.name: _on_host(item.layout.to_huggingface(_whole(item, mesh))) for item in group}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if list(files) != [SINGLE]:
        total = sum(item.nbytes for group in files.values() for item in group)
        index = {item.name: file for file, group in files.items() for item in group}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _on_host(tensor: Tensor) -> Tensor:
    """A contiguous copy: safetensors writes no two names from one storage."""
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _whole(item: _Item, mesh: DeviceMesh | None) -> Tensor:
    """The parameter over all ranks, on this rank's device."""
    tensor, placement = item.parameter.data, item.placement
    if placement.dim is not None and mesh is not None and not isinstance(tensor, DTensor):
        shape = torch.Size(placement.shape)
        stride = torch.empty(shape, device="meta").stride()
        tensor = DTensor.from_local(
            tensor, mesh, [Shard(placement.dim)], run_check=False, shape=shape, stride=stride
        )
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
