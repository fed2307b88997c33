"""Saving the state after a prompt, and restoring it under any degree: gathering, slicing, checking."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ssm_dist.build import LoadedModel
from ssm_dist.engine import Engine
from ssm_dist.errors import UserError
from ssm_dist.generation import NO_ROOM
from ssm_dist.parallel.collectives import broadcast_bytes, tp_all_gather
from ssm_dist.prefix_cache import PrefixCache
from ssm_dist.prefix_limits import chunk_grid
from ssm_dist.sampling.params import SamplingParams
from ssm_dist.scheduler import Chunk, Sequence
from ssm_dist.state_cache import HostState
from ssm_dist.state_file import StateInfo, history_hash, inspect_state, read_part, write_state
from ssm_dist.state_sizes import PAGE_TOKENS, pages_of


@dataclass(frozen=True)
class SavedState:
    """A state that a model holds, or has written."""

    token_ids: list[int]
    """Everything said so far; prompts that begin with it resume from the state."""
    file: Path


def save_state(
    loaded: LoadedModel,
    engine: Engine,
    prefixes: PrefixCache,
    token_ids: list[int],
    file: Path,
    chunk_tokens: int,
) -> SavedState:
    """Write the state after a prompt. Collective; raises `UserError` on every rank if that fails."""
    state = _state_after(engine, prefixes, token_ids, chunk_tokens)
    tensors = _gathered(state, len(token_ids) - 1, loaded)
    info = _info(loaded, token_ids)
    error = ""
    if loaded.tp is None or loaded.tp.rank == 0:
        try:
            write_state(file, info, tensors | {"token_ids": torch.tensor(token_ids)})
        except UserError as problem:
            error = str(problem)
    if loaded.tp is not None:
        error = broadcast_bytes(error.encode(), loaded.tp.group, loaded.device).decode()
    if error:
        raise UserError(error)
    return SavedState(token_ids, file)


def load_state(loaded: LoadedModel, prefixes: PrefixCache, file: Path) -> SavedState:
    """Hold a saved state on the host, for prompts that begin with its tokens. Ranks call it alike.

    Raises `UserError` for a damaged file, or one of another model or dtype.
    """
    info, token_ids, shapes = inspect_state(file)
    wanted = _info(loaded, token_ids)
    if info.model_type != wanted.model_type:
        raise UserError(f"{file} was saved by a {info.model_type} model, and this is a {wanted.model_type}")
    for key, setting in (("dtype", "[model] dtype"), ("state_dtype", "[cache] state_dtype")):
        have, want = getattr(info, key), getattr(wanted, key)
        if have != want:
            raise UserError(f"{file} holds {have}, and this model runs with {want}; set {setting} = {have!r}")
    if info.fingerprint != wanted.fingerprint:
        raise UserError(
            f"{file} was saved by a {info.model_type} with other sizes or weights; load the one that saved it"
        )
    if len(token_ids) > 1:
        prefixes.put(token_ids[:-1], _part(file, shapes, loaded))
    return SavedState(token_ids, file)


def fingerprint(loaded: LoadedModel) -> str:
    """SHA-256 of a model's sizes and of the sums of every parameter's bit patterns.

    Sums of integers do not depend on how a parameter is split, so every degree has the same one.
    """
    first = loaded.tp is None or loaded.tp.rank == 0
    sums = torch.stack(
        [
            _bit_sum(loaded.model.get_parameter(p.path).data) * (p.dim is not None or first)
            for p in loaded.plan.parameters
        ]
    )
    if loaded.tp is not None:
        dist.all_reduce(sums, group=loaded.tp.mesh.get_group())
    sizes = {key: value for key, value in asdict(loaded.config).items() if key != "vocab_padded"}
    paths = [p.path for p in loaded.plan.parameters]
    described = json.dumps([_model_type(loaded), sizes, paths, sums.tolist()], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def _bit_sum(tensor: Tensor) -> Tensor:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(integer).sum(dtype=torch.int64)


def _model_type(loaded: LoadedModel) -> str:
    return type(loaded.model).__name__


def _info(loaded: LoadedModel, token_ids: list[int]) -> StateInfo:
    dtype, state_dtype = (str(d).removeprefix("torch.") for d in (loaded.dtype, loaded.state_dtype))
    return StateInfo(_model_type(loaded), fingerprint(loaded), dtype, state_dtype, history_hash(token_ids))


@torch.inference_mode()
def _state_after(engine: Engine, prefixes: PrefixCache, token_ids: list[int], chunk_tokens: int) -> HostState:
    """The state that has absorbed all tokens but the last, computed from the longest known prefix on."""
    place = prefixes.acquire(token_ids, len(token_ids))
    if place is None:
        raise UserError(NO_ROOM)
    sequence = Sequence(-1, token_ids, SamplingParams())
    sequence.slot, start = place
    limits = prefixes.limits
    grid = chunk_tokens if limits is None else chunk_grid(limits.interval, chunk_tokens)
    try:
        while start < len(token_ids) - 1:
            end = min(start - start % grid + grid, len(token_ids) - 1)
            engine.hidden([Chunk(sequence, start, end - start)])
            start = end
        state = engine.cache.export_sequence(sequence.slot, start)
    finally:
        engine.cache.release(sequence.slot)
    state.wait()
    return state


def _split_dim(loaded: LoadedModel, parameter: str) -> bool:
    """Whether the plan splits a kind of parameter; False where the model has none of it."""
    return any(p.path.endswith(parameter) and p.dim is not None for p in loaded.plan.parameters)


def _gathered(state: HostState, tokens: int, loaded: LoadedModel) -> dict[str, Tensor]:
    """conv, ssm and kv over all ranks, on the host."""
    kv = state.kv.flatten(2, 3)[:, :, :tokens] if state.kv.numel() else state.kv.new_empty(0)
    channels = _split_dim(loaded, "mixer.A_log")
    return {
        "conv": _whole(state.conv, 2, loaded) if channels else state.conv,
        "ssm": _whole(state.ssm, 1, loaded) if channels else state.ssm,
        "kv": _whole(kv, 3, loaded) if kv.numel() and _split_dim(loaded, "attention.k_proj.weight") else kv,
    }


def _whole(part: Tensor, dim: int, loaded: LoadedModel) -> Tensor:
    """The parts of all ranks side by side along `dim`; gathered one layer or site at a time."""
    tp = loaded.tp
    if tp is None:
        return part.contiguous()
    rows = []
    for entry in part:
        flat = entry.reshape(math.prod(entry.shape[: dim - 1]), -1)
        rows.append(tp_all_gather(flat.to(loaded.device), tp.group, tp.degree).cpu())
    shape = list(part.shape)
    shape[dim] *= tp.degree
    return torch.stack(rows).view(shape)


def _part(file: Path, shapes: dict[str, tuple[int, ...]], loaded: LoadedModel) -> HostState:
    """This rank's part of a file."""

    def mine(size: int, split: bool) -> tuple[int, int]:
        if loaded.tp is None or not split:
            return 0, size
        return size // loaded.tp.degree * loaded.tp.rank, size // loaded.tp.degree * (loaded.tp.rank + 1)

    heads = shapes["kv"][3] if len(shapes["kv"]) > 1 else 0
    tensors = read_part(
        file,
        mine(shapes["ssm"][1], _split_dim(loaded, "mixer.A_log")),
        mine(heads, _split_dim(loaded, "attention.k_proj.weight")),
    )
    kv = tensors["kv"]
    if heads:
        pages = pages_of(kv.shape[2])
        kv = F.pad(kv, (0, 0, 0, 0, 0, pages * PAGE_TOKENS - kv.shape[2])).unflatten(2, (pages, PAGE_TOKENS))
    return HostState(tensors["conv"], tensors["ssm"], kv)
