"""All layers in one kernel, for one sequence, by how much is asked for ahead of its use.

    torchrun --standalone --nproc-per-node 2 benchmarks/fused_layers.py --out FILE.json [--models mamba-2.8b]
        [--ahead 2 3 4] [--before-x 1 2] [--chunks 5 10]

Milliseconds of `LayerStack.launch` on random weights, without embedding and head: the median of 15 replays
of a CUDA graph of four. AHEAD and BEFORE_X are those of `kernel_sizes`, which the first row of a model has;
every value named is tried in place of its own. --chunks changes the pieces, with as many slots as fit. The
floor is the time to read a rank's weights at 4.24 TB/s.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ssm_dist.build import LoadedModel, load_model
from ssm_dist.config_reading import build_config
from ssm_dist.kernel_benchmark.program import environment
from ssm_dist.kernels.decode_layers import LayerStack
from ssm_dist.kernels.gluon_layers_form import piece_bytes
from ssm_dist.provenance import command, commit
from ssm_dist.ranks import close_ranks
from ssm_dist.state_cache import StateCache

COPY = 4.24e12
"""Bytes a second."""
STEPS, REPLAYS = 4, 15


def loaded(model: str) -> LoadedModel:
    """A preset at the degree that torchrun started."""
    degree = int(os.environ.get("WORLD_SIZE", "1"))
    given = {"model": {"preset": model}, "parallel": {"tensor": degree}, "cache": {"max_sequences": 2}}
    return load_model(build_config(None, given, given_by="this program"))


def changes(options: argparse.Namespace, constants: dict[str, int]) -> Iterator[dict[str, int]]:
    """What to run instead of the kernel's constants, nothing first."""
    yield {}
    for name, values in (("AHEAD", options.ahead), ("BEFORE_X", options.before_x)):
        yield from ({name: value} for value in values if value != constants[name])
    for chunks in options.chunks:
        slots = constants["SLOTS"] * piece_bytes(constants["CHUNKS"]) // piece_bytes(chunks)
        yield from ({"CHUNKS": chunks, "SLOTS": slots, "AHEAD": ahead} for ahead in (2, 3) if ahead < slots)


def milliseconds(stack: LayerStack, cache: StateCache, hidden: torch.Tensor) -> list[float]:
    """Of a step, of each replay."""
    slots = torch.zeros(1, dtype=torch.int32, device=hidden.device)
    conv, ssm = cache.state.part(range(len(stack.layers)))
    stack.launch(hidden, None, slots, conv, ssm)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(STEPS):
            stack.launch(hidden, None, slots, conv, ssm)
    if dist.is_initialized():
        dist.barrier()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / STEPS)
    return sorted(times)


def rows(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One for each variant of a model."""
    it = loaded(name)
    if len(it.model.stacks) != 1:
        sys.exit(f"{name}: the log says why its layers are not in one kernel here")
    stack, d_model = it.model.stacks[0], it.config.d_model
    cache = StateCache(
        it.model.state_shapes(), max_sequences=2, max_tokens=1, dtype=it.dtype, state_dtype=torch.float32,
        device=it.device,
    )  # fmt: skip
    hidden = torch.randn(1, d_model, device=it.device).to(it.dtype)
    weights = sum(t.nbytes for layer in stack.layers for t in layer.all())
    constants = stack.constants
    for change in changes(options, constants):
        stack.constants = constants | change
        times = milliseconds(stack, cache, hidden)
        yield {
            "model": name, "degree": stack.constants["RANKS"], **change,
            "ms": round(times[len(times) // 2], 4), "least": round(times[0], 4),
            "floor": round(1e3 * weights / COPY, 4),
            **({} if change else {"constants": constants}),
        }  # fmt: skip


def main() -> None:
    """Run all models; rank 0 prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["mamba-2.8b", "falcon-mamba-7b"])
    parser.add_argument("--ahead", type=int, nargs="*", default=[2, 3, 4, 6])
    parser.add_argument("--before-x", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--chunks", type=int, nargs="*", default=[])
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    speaks = os.environ.get("RANK", "0") == "0"
    with torch.inference_mode():
        for model in options.models:
            for row in rows(model, options):
                found.append(row)
                if speaks:
                    print(json.dumps(row), flush=True)
            torch.cuda.empty_cache()
    if speaks:
        called = command("benchmarks/fused_layers.py", sys.argv[1:])
        report = {**environment(torch.device("cuda")), "command": called, "commit": commit(), "rows": found}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    close_ranks()


if __name__ == "__main__":
    main()
