"""Runs a benchmark: models, codecs and backends one after the other, all cases with each."""

from __future__ import annotations

import contextlib
import datetime
import gc
import itertools
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ssm_dist.benchmark.breakdown import break_down, write_trace
from ssm_dist.benchmark.cases import Case, cases_of
from ssm_dist.benchmark.clocks import ClockWatch, clock_watch
from ssm_dist.benchmark.floors import Ceilings, ceilings_of, state_bytes
from ssm_dist.benchmark.timing import time_case
from ssm_dist.build import device_type
from ssm_dist.capture import resolve_mode
from ssm_dist.config import Config, ReductionConfig
from ssm_dist.errors import UserError
from ssm_dist.llm import LLM
from ssm_dist.provenance import command, commit
from ssm_dist.ranks import init_ranks
from ssm_dist.version import __version__

logger = logging.getLogger(__name__)

Document = dict[str, Any]
"""What a run tells: system, version, environment, and cases, each of which says what it was run with."""


def run_benchmark(config: Config, save: Callable[[Document], None] = lambda document: None) -> Document:
    """Measure all cases with every model, codec and backend of [benchmark]; the same calls on every rank.

    `save` is called after every case with the document so far. A case that an engine cannot hold, and a model
    that does not fit where there are others, have their reason in "error". Raises `UserError` for what
    cannot run at all.
    """
    grid, cases = config.benchmark, cases_of(config.benchmark)
    if config.cache.prefix_device_bytes:
        raise UserError(
            "a benchmark repeats its prompts, and must read them: set cache.prefix_device_bytes = 0"
        )
    ranks = init_ranks(config.parallel.tensor, device_type())
    rates = ceilings_of(ranks.device)
    document = new_document(config, ranks.device, rates)
    variants = list(variants_of(config))
    for variant in variants:
        try:
            llm, seconds = _loaded(variant)
        except UserError as error:
            if len(variants) == 1:
                raise
            document["cases"] += [{**named(variant), **asdict(case), "error": str(error)} for case in cases]
            continue
        told = named(variant) | engine_of(llm) | {"load_seconds": seconds}
        watched = clock_watch(ranks.device) if ranks.rank == 0 else None  # whose document is kept
        with watched or contextlib.nullcontext() as watch:
            _measure(llm, cases, told, rates, watch, document, save)
        if grid.profile is not None and variant is variants[0]:
            write_trace(llm, cases[0], grid.profile, barrier)
        del llm
    return document


def _measure(
    llm: LLM, cases: list[Case], told: dict[str, Any], rates: Ceilings | None, watch: ClockWatch | None,
    document: Document, save: Callable[[Document], None],
) -> None:  # fmt: skip
    """Time all cases, then break each down, which slows down what follows; rows go into the document."""
    grid, rows = llm.config.benchmark, []
    for case in cases:
        begin = time.perf_counter()
        measures = time_case(llm, case, grid.repeats, grid.warmup, rates, barrier, watch)
        rows.append({**told, **asdict(case), **measures})
        logger.info("%s %s, %.1f s: %s", told["model"], case, time.perf_counter() - begin, _brief(measures))
        document["cases"].append(rows[-1])
        save(document)
    for case, row in zip(cases, rows, strict=True):
        if grid.breakdown and "error" not in row:
            row |= break_down(llm, case, barrier)
            save(document)


def variants_of(config: Config) -> Iterator[Config]:
    """One configuration for each model, codec and backend that [benchmark] names; one rank needs no codec."""
    grid = config.benchmark
    codecs = grid.codecs if config.parallel.tensor > 1 else ()
    product = itertools.product(grid.models or (None,), codecs or (None,), grid.backends or (None,))
    for model, codec, backend in product:
        changes: dict[str, Any] = {}
        if model is not None:
            changes["model"] = config.model.model_copy(update={"preset": model, "checkpoint": None})
        if codec is not None:
            changes["reduction"] = config.reduction.model_copy(update={"codec": codec})
        if backend is not None:
            changes["kernels"] = config.kernels.model_copy(update={"backend": backend})
        yield config.model_copy(update=changes)


def _loaded(config: Config) -> tuple[LLM, float]:
    """The engine, in the memory of the one before, and the seconds that it took."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    begin = time.perf_counter()
    return LLM.from_config(config), round(time.perf_counter() - begin, 2)


def barrier() -> None:
    """All ranks of the job go on together."""
    if dist.is_initialized():
        dist.barrier()


def named(config: Config) -> dict[str, Any]:
    """What a case runs with that cases of unlike documents are compared by."""
    asked, degree = config.model, config.parallel.tensor
    return {
        "model": asked.preset or Path(asked.checkpoint or "").name,
        "degree": degree,
        "codec": _codec(config.reduction) if degree > 1 else "none",
        "p2p": os.environ.get("NCCL_P2P_DISABLE") != "1",
    }


def _codec(section: ReductionConfig) -> str:
    return section.codec + (" with feedback" if section.feeds_back else "")


def engine_of(llm: LLM) -> dict[str, Any]:
    """What it runs with."""
    return {
        "kernels": llm.loaded.kernels,
        "compile": resolve_mode(llm.config.compile, llm.loaded),
        "reductions": llm.reduction,
        "dtype": str(llm.loaded.dtype).removeprefix("torch."),
        "state_dtype": llm.config.cache.state_dtype,
        "chunk_tokens": llm.loaded.chunk_tokens,
        "weight_bytes_a_rank": llm.weight_bytes,
        "state_bytes_a_sequence_and_rank": state_bytes(llm),
    }


def new_document(config: Config, device: torch.device, rates: Ceilings | None) -> Document:
    """A document without cases."""
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else f"CPU, {platform.machine()}"
    return {
        "system": "ssm-dist",
        "version": __version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "command": command(Path(sys.argv[0]).name, sys.argv[1:]),
        "environment": {
            "hardware": f"{config.parallel.tensor} x {name}",
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "ceilings": rates and asdict(rates),
            "variables": {key: value for key, value in os.environ.items() if key.startswith("NCCL_")},
        },
        "config": config.model_dump(mode="json", exclude={"benchmark": {"folder", "profile"}}),
        "cases": [],
    }


def _brief(measures: dict[str, Any]) -> str:
    if "error" in measures:
        return str(measures["error"])
    told = [f"prefill {measures['prefill_tokens_per_second']:,.0f} tokens/s"]
    if measures.get("decode_ms_a_step"):
        told.append(f"{measures['decode_ms_a_step']:.3f} ms a decode step")
    if "output_tokens_per_second" in measures:
        told.append(f"output {measures['output_tokens_per_second']:,.0f} tokens/s")
    return ", ".join(told)
