"""The tables that the program prints."""

from __future__ import annotations

import statistics

from rich.table import Table

from ssm_dist.generation import Completion
from ssm_dist.llm import LLM


def run_table(llm: LLM, completions: list[Completion]) -> Table:
    """What a run took: times, rates, memory of one rank, and which code paths ran."""
    done = [c for c in completions if c.token_ids]
    tokens = sum(len(c.token_ids) for c in done)
    seconds = max((c.seconds or 0.0 for c in done), default=0.0)
    first = [c.seconds_to_first_token or 0.0 for c in done]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {
        "requests": f"{len(done)}"
        + (f", {len(completions) - len(done)} failed" if len(done) < len(completions) else ""),
        "time to first token": f"{statistics.median(first) * 1e3:.1f} ms (median)" if first else "-",
        "throughput": f"{tokens / seconds:.1f} tokens/s ({tokens} tokens in {seconds:.2f} s)"
        if seconds
        else "-",
        "weights a rank": size(llm.weight_bytes),
        "state a rank": f"{size(llm.cache.bytes_allocated)} ({llm.cache.max_sequences} sequences)",
        "ranks": f"{llm.config.parallel.tensor} x {llm.loaded.device.type}, {str(llm.loaded.dtype)[6:]}",
        "kernels": llm.loaded.kernels,
        "steps": llm.engine.how,
        "reductions": llm.reduction,
    }
    if llm.prefixes.limits is not None:
        rows["prefix reuse"] = _reuse(llm)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _reuse(llm: LLM) -> str:
    """Counters of the prefix cache."""
    counters, held = llm.prefixes.counters, llm.prefixes.bytes_held
    levels = zip(held, ("device", "host", "files"), strict=True)
    return (
        f"{counters.hits} hits, {counters.misses} misses, {counters.tokens_saved} tokens saved; "
        + ", ".join(f"{size(count)} on {name}" for count, name in levels if count)
    ).removesuffix("; ")


def size(count: int) -> str:
    """Bytes for people: 5.54 GB, 12.3 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"
