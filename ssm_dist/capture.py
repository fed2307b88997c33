"""An engine as [compile] asks for it: steps as they are, captured in CUDA graphs, or compiled before that."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal

import torch
from rich.console import Console

from ssm_dist.build import LoadedModel
from ssm_dist.config import CompileConfig, Config
from ssm_dist.engine import Engine
from ssm_dist.errors import UserError
from ssm_dist.graphs import Graphs
from ssm_dist.parallel.collectives import wait_for_event
from ssm_dist.prefill import HALVES_FROM
from ssm_dist.sampling.sampler import Sampler
from ssm_dist.state_cache import StateCache

logger = logging.getLogger(__name__)

Mode = Literal["none", "capture", "compile"]


def start_engine(loaded: LoadedModel, cache: StateCache, config: Config) -> Engine:
    """The engine of a loaded model, its decode steps captured; every rank calls it alike.

    Raises `UserError` when [compile] mode cannot run here.
    """
    mode, vocab_size = resolve_mode(config.compile, loaded), loaded.config.vocab_size
    engine = Engine(
        loaded.model,
        cache,
        Sampler(cache.max_sequences + 1, vocab_size, loaded.device),
        vocab_size,
        graphs=Graphs(loaded.device) if mode != "none" and loaded.device.type == "cuda" else None,
        compiled=mode == "compile",
        chunk_tokens=loaded.chunk_tokens,
        overlap_tokens=0 if loaded.tp is None else overlap_tokens(config),
        wait=_bounded_wait(loaded),
    )
    logger.info("compile: mode %s", mode)
    _capture(engine, speaks=loaded.tp is None or loaded.tp.rank == 0)
    return engine


def overlap_tokens(config: Config) -> int:
    """Tokens of a prefill step that several ranks work on in halves; 0: of none."""
    asked = config.prefill.overlap_tokens
    return HALVES_FROM[config.reduction.codec != "none"] if asked is None else asked


def resolve_mode(section: CompileConfig, loaded: LoadedModel) -> Mode:
    """What [compile] mode means for a model on its device."""
    if section.mode == "auto":
        # the definitions of some ops ask the device for sizes, which a capture forbids
        captures = loaded.device.type == "cuda" and loaded.kernels != "reference"
        return "capture" if captures else "none"
    if section.mode == "capture" and loaded.device.type != "cuda":
        raise UserError("[compile] mode = 'capture' needs a GPU; on a CPU choose 'none', 'compile' or 'auto'")
    asks = loaded.device.type == "cuda" or loaded.model.state_shapes().attention_sites > 0
    if section.mode != "none" and loaded.kernels == "reference" and asks:
        raise UserError(
            f"[compile] mode = {section.mode!r} needs [kernels] backend = 'triton' or 'mamba_ssm' here: the "
            "definitions of some ops read sizes back from the device; choose 'none' or 'auto' for them"
        )
    return section.mode


def _capture(engine: Engine, speaks: bool) -> None:
    """Capture the decode steps, and say how far that is."""
    if engine.graphs is None:
        return
    begun, sizes = time.perf_counter(), []
    console = Console(stderr=True, quiet=not speaks)
    with console.status("capturing decode steps") as status:
        for size in engine.capture_ahead():
            sizes.append(size)
            status.update(f"capturing decode steps: batches of {size} sequences are done")
    logger.info(
        "compile: decode steps of %d batch sizes captured in %.1f s", len(sizes), time.perf_counter() - begun
    )


def _bounded_wait(loaded: LoadedModel) -> Callable[[torch.cuda.Event], None]:
    """Waiting for a step: under tensor parallelism not for ever, since another rank may have failed."""
    tp = loaded.tp
    if tp is None:
        return torch.cuda.Event.synchronize
    return lambda done: wait_for_event(tp.group, done)
