"""Prefill in halves, the sums over ranks of one beside the compute of the other, against whole steps.

    torchrun --standalone --nproc-per-node 2 benchmarks/overlap.py --out benchmarks/overlap

One model at the degree that torchrun starts. Each case is read in whole steps of --prefill.chunk_tokens
tokens and of half as many, and in steps of halves, by how many programs a multiprocessor the sums have. The
times of kernels are from a profiled run of its own; a sum beside others counts as long as it runs alone.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import reporting

from ssm_dist import LLM
from ssm_dist.benchmark.breakdown import break_down
from ssm_dist.benchmark.cases import Case, parse_case
from ssm_dist.benchmark.program import barrier
from ssm_dist.benchmark.timing import run_case
from ssm_dist.config import CacheConfig, Config, PrefillConfig
from ssm_dist.graphs import Graphs
from ssm_dist.parallel.collectives import shared

CASES = ["8x2048+1", "16x2048+1", "64x2048+1", "1x16384+1", "1x32768+1"]


def stepped(llm: LLM, chunk_tokens: int, programs: int) -> None:
    """Let the engine read prompts in such steps; programs: of sums beside others, 0: whole steps."""
    shared.BESIDE_A_SCAN.update({False: programs, True: programs})
    llm.engine.graphs = Graphs(llm.loaded.device) if llm.engine.graphs is not None else None
    llm.loaded = replace(llm.loaded, chunk_tokens=chunk_tokens)
    llm.engine.prefill.overlap_tokens = min(programs, 1)


def measured(llm: LLM, case: Case, repeats: int) -> dict[str, Any]:
    """Of the prefill of one case."""
    for _ in range(2):  # a step is captured when it comes for the second time
        run_case(llm, case, 1, barrier)
    seconds = statistics.median(run_case(llm, case, 1, barrier).seconds for _ in range(repeats))
    profile = break_down(llm, case, barrier)["prefill_breakdown"]
    return {
        "ms": round(1e3 * seconds, 2),
        "tokens/s": round(case.batch * case.prompt_tokens / seconds),
        "ms of kernels": profile["busy_ms"],
        "of these of sums alone": profile["reduction_ms"],
    }


def rows_of(llm: LLM, options: Any, whole: int, began: float) -> list[dict[str, Any]]:
    """A row for each case and way of stepping, until the time is up."""
    codec, rows = llm.config.reduction.codec, list[dict[str, Any]]()
    for case in map(parse_case, options.cases):
        tokens = case.batch * case.prompt_tokens
        ways = [(whole // 2, 0)] if tokens <= whole // 2 else [(whole // 2, 0), (whole, 0)]
        for most, programs in [*ways, *((whole, programs) for programs in options.programs)]:
            if reporting.agreed(time.monotonic() - began > options.seconds):
                continue
            stepped(llm, most, programs)
            steps = f"in halves, {programs}" if programs else "whole"
            about = {"codec": codec, "case": str(case), "steps": steps, "tokens of a step": min(tokens, most)}
            rows.append(about | measured(llm, case, options.repeats))
    return rows


def main() -> reporting.Report:
    """All codecs, one after the other."""
    began = time.monotonic()
    parser = reporting.parser(__doc__)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--codecs", nargs="+", default=["none", "int8"])
    parser.add_argument("--programs", type=int, nargs="+", default=[1, 3], help="a multiprocessor")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=600.0, help="after which nothing new is measured")
    options, flags = parser.parse_known_args()
    cache, prefill = CacheConfig(max_sequences=64), PrefillConfig(chunk_tokens=32768)
    config = reporting.configuration(
        options.preset, flags, cache=cache.model_dump(), prefill=prefill.model_dump()
    )
    whole, rows = config.prefill.chunk_tokens, list[dict[str, Any]]()
    report = reporting.Report(options.out, options.preset, with_codec(config, options.codecs[0]))
    llm = LLM(report.loaded, with_codec(config, options.codecs[0]))
    for codec in options.codecs:
        if codec != llm.config.reduction.codec:
            llm = LLM.from_config(with_codec(config, codec))
        rows += rows_of(llm, options, whole, began)
        report.add("prefill", rows)
    return report


def with_codec(config: Config, codec: str) -> Config:
    """The same job with another codec between ranks."""
    return config.model_copy(update={"reduction": config.reduction.model_copy(update={"codec": codec})})


if __name__ == "__main__":
    reporting.run(main)
