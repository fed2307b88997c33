"""From a configuration to a loaded model: the one place where ranks, model, plan and checkpoint meet."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from ssm_dist.checkpoint.folder import Checkpoint, open_checkpoint
from ssm_dist.checkpoint.load import load_parameters, resolve_dtype
from ssm_dist.checkpoint.random_weights import random_parameters
from ssm_dist.config import Config, ReductionConfig
from ssm_dist.errors import UserError
from ssm_dist.fused_layers import fuse_layers
from ssm_dist.kernels import backend
from ssm_dist.kernels.codecs import CodecName
from ssm_dist.memory import estimate, require_memory
from ssm_dist.models.config_json import ConfigJson
from ssm_dist.models.language_model import LanguageModel, LanguageModelConfig
from ssm_dist.models.mixer import arrange_weights
from ssm_dist.parallel import ResolvedPlan, TensorParallel, apply_plan, localise, resolve_plan
from ssm_dist.parallel.collectives import Reductions, Wire, broadcast_bytes
from ssm_dist.parallel.collectives.tables import SHIPPED, table_from_json, use_table
from ssm_dist.prefix_limits import prefix_limits
from ssm_dist.ranks import Ranks, init_ranks
from ssm_dist.registry import ModelSpec, preset, spec_for
from ssm_dist.text import Tokenizer, read_eos_ids

VOCAB_MULTIPLE = 8
"""Rows of the vocabulary on a rank are a multiple of this, as fast GEMMs want."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """What a configuration names: an architecture with its sizes, and a checkpoint unless it is a preset."""

    spec: ModelSpec
    config: LanguageModelConfig
    """With the vocabulary padded to the degree."""
    checkpoint: Checkpoint | None
    dtype: torch.dtype


@dataclass(frozen=True)
class LoadedModel:
    """One rank's shard, ready to run, and all that is known of it."""

    model: LanguageModel
    """Of local tensors."""
    spec: ModelSpec
    config: LanguageModelConfig
    plan: ResolvedPlan
    """Where every parameter lives."""
    tp: TensorParallel | None
    """None for a single rank."""
    checkpoint: Checkpoint | None
    tokenizer: Tokenizer | None
    eos_ids: frozenset[int]
    dtype: torch.dtype
    state_dtype: torch.dtype
    device: torch.device
    kernels: str
    """The backend that runs."""
    chunk_tokens: int
    """Of a prefill step at most."""


def load_model(config: Config) -> LoadedModel:
    """Join the ranks, check everything that can be checked, then load this rank's shard.

    Collective: every rank of [parallel] tensor calls it alike. Raises `UserError` for whatever does not fit:
    world size, checkpoint, degree, memory.
    """
    ranks = init_ranks(config.parallel.tensor, device_type())
    chunk_tokens = config.chunk_tokens(ranks.device.type)
    prefix_limits(config.cache, chunk_tokens)  # before minutes of loading
    kernels = backend.select(config.kernels.backend, ranks.device)
    source = open_source(config, ranks.device.type, ranks)
    model = build_meta(source)
    tp = None
    if ranks.world > 1:
        tp = TensorParallel.over_all_ranks(ranks.device.type, reductions_of(config.reduction))
        _agree_on_table(tp, config.reduction.table, ranks)
    plan = resolve_plan(model, source.spec.plan, 1) if tp is None else apply_plan(model, tp, source.spec.plan)
    if tp is not None and ranks.device.type == "cuda" and kernels != "reference":
        tokens = max(chunk_tokens, config.cache.max_sequences)
        tp.share_memory(tokens, source.config.d_model, source.dtype, ranks.device)
    _check_memory(model, source, plan, config, chunk_tokens, ranks)
    _load(model, source, ranks)
    localise(model)
    arrange_weights(model)
    fuse_layers(model, tp, config.kernels, kernels, ranks.device)
    checkpoint = source.checkpoint
    tokenizer = None if checkpoint is None else Tokenizer.from_folder(checkpoint.folder)
    return LoadedModel(
        model=model.eval(), spec=source.spec, config=source.config, plan=plan, tp=tp, checkpoint=checkpoint,
        tokenizer=tokenizer, eos_ids=_eos_ids(checkpoint, tokenizer), dtype=source.dtype,
        state_dtype=getattr(torch, config.cache.state_dtype), device=ranks.device, kernels=kernels,
        chunk_tokens=chunk_tokens,
    )  # fmt: skip


def device_type() -> str:
    """ "cuda" where every rank of this host can have a GPU of its own, else "cpu"."""
    ranks_here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    chosen = "cuda" if gpus >= ranks_here else "cpu"
    logger.info("device: %s (%d GPUs for %d ranks on this host)", chosen, gpus, ranks_here)
    return chosen


def open_source(config: Config, device_type: str, ranks: Ranks | None = None) -> Source:
    """Find the model that [model] names; its weights are not touched. Without `ranks` for one process."""
    asked, degree = config.model, config.parallel.tensor
    if asked.preset is not None:
        spec, sizes = preset(asked.preset)
        automatic = torch.bfloat16 if device_type == "cuda" else torch.float32
        dtype = automatic if asked.dtype == "auto" else getattr(torch, asked.dtype)
        return Source(spec, _padded(sizes, degree), None, dtype)
    assert asked.checkpoint is not None
    together = ranks is not None and ranks.world > 1
    checkpoint = open_checkpoint(
        asked.checkpoint,
        downloads=ranks is None or ranks.local_rank == 0,
        barrier=dist.barrier if together else lambda: None,
    )
    try:
        spec = spec_for(_model_type(checkpoint))
        sizes = spec.config.from_huggingface(checkpoint.config)
    except UserError as error:
        raise UserError(f"{checkpoint.folder}: {error}") from None
    return Source(spec, _padded(sizes, degree), checkpoint, resolve_dtype(asked.dtype, checkpoint))


def build_meta(source: Source) -> LanguageModel:
    """The whole model on the meta device: shapes and dtypes without memory."""
    with torch.device("meta"), _default_dtype(source.dtype):
        return source.spec.build(source.config)


def reductions_of(section: ReductionConfig) -> Reductions:
    """What [reduction] asks for, by kind of reduction."""

    def wire(codec: CodecName) -> Wire:
        return Wire(codec, section.group_size or (32 if codec == "int4" else 128), section.algorithm)

    return Reductions(
        wire(section.codec),
        wire(section.x_proj_codec),
        wire(section.embedding_codec),
        section.timeout_seconds,
        section.feeds_back,
    )


def _agree_on_table(tp: TensorParallel, file: Path | None, ranks: Ranks) -> None:
    """Let all ranks choose algorithms by the same table: rank 0's file, or the one that ships.

    Raises `UserError`, on all ranks, when the file cannot be read or holds no table.
    """
    if file is None:
        use_table(SHIPPED)
        return
    text, problem = b"", ""
    if tp.rank == 0:
        try:
            text = file.read_bytes()
        except OSError as error:
            problem = f"cannot read the table of reductions {file}: {error.strerror}"
    problem = broadcast_bytes(problem.encode(), tp.group, ranks.device).decode()
    if problem:
        raise UserError(problem)
    text = broadcast_bytes(text, tp.group, ranks.device)
    use_table(table_from_json(text.decode(errors="replace"), str(file)))


def _check_memory(
    model: LanguageModel, source: Source, plan: ResolvedPlan, config: Config, chunk_tokens: int, ranks: Ranks
) -> None:
    """Raise on all ranks alike when one of them lacks the memory that the job will take."""
    need = estimate(
        source.config,
        model.state_shapes(),
        plan.parameters,
        dtype=source.dtype,
        state_dtype=getattr(torch, config.cache.state_dtype),
        max_sequences=config.cache.max_sequences,
        max_tokens=config.cache.max_tokens,
        chunk_tokens=chunk_tokens,
        prefix_bytes=config.cache.prefix_device_bytes,
        captured=ranks.device.type == "cuda" and config.compile.mode != "none",
        feedback=config.reduction.feeds_back and config.parallel.tensor > 1,
    )

    def least(free: int) -> int:
        if ranks.world == 1:
            return free
        smallest = torch.tensor(free, device=ranks.device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        return int(smallest)

    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    require_memory(need, ranks.device, ranks_here=ranks_here, minimum=least)


def _load(model: LanguageModel, source: Source, ranks: Ranks) -> None:
    weights = source.spec.weights(source.config)
    if source.checkpoint is None:
        random_parameters(model, device=ranks.device, dtype=source.dtype)
        return
    load_parameters(
        model, source.checkpoint, weights, device=ranks.device, dtype=source.dtype, progress=ranks.rank == 0
    )


def _padded(sizes: LanguageModelConfig, degree: int) -> LanguageModelConfig:
    """The sizes with a vocabulary that every rank holds an equal part of."""
    multiple = degree * VOCAB_MULTIPLE if degree > 1 else 1
    return replace(sizes, vocab_padded=-(-sizes.vocab_size // multiple) * multiple)


def _model_type(checkpoint: Checkpoint) -> str:
    """config.json's model_type; the original state-spaces spelling has none."""
    if "model_type" not in checkpoint.config and "ssm_cfg" in checkpoint.config:
        return "mamba"
    return ConfigJson(checkpoint.config).text("model_type", "(none in config.json)")


def _eos_ids(checkpoint: Checkpoint | None, tokenizer: Tokenizer | None) -> frozenset[int]:
    if tokenizer is not None:
        return tokenizer.eos_ids
    return frozenset() if checkpoint is None else read_eos_ids(checkpoint.folder)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)
