"""All layers in one kernel, for a few sequences, by how much is asked for ahead of its use.

    torchrun --standalone --nproc-per-node 2 benchmarks/fused_layers.py --out FILE.json [--models mamba-2.8b]
        [--sequences 1 4 8] [--ahead 2 3 4] [--before-x 1 2] [--chunks 5 10]

Milliseconds of all layers on random weights, with the embedding, without the head: the median of 15 replays
of a CUDA graph of four steps, in one kernel and layer by layer. AHEAD and BEFORE_X are those of
`decode_sizes`, which the first row has; every value named is tried in place of its own. --chunks changes the
pieces of one sequence, with as many slots as fit. The floor is the time to read a rank's weights once, and
its states twice, at 4.24 TB/s.
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
from ssm_dist.kernels.gluon_layers_form import piece_bytes
from ssm_dist.models.batch import RaggedBatch
from ssm_dist.models.language_model import LanguageModel
from ssm_dist.provenance import command, commit
from ssm_dist.ranks import close_ranks
from ssm_dist.state_cache import StateCache

COPY = 4.24e12
"""Bytes a second."""
STEPS, REPLAYS, SLOTS = 4, 15, 16


def loaded(model: str) -> LoadedModel:
    """A preset at the degree that torchrun started."""
    degree = int(os.environ.get("WORLD_SIZE", "1"))
    given = {"model": {"preset": model}, "parallel": {"tensor": degree}, "cache": {"max_sequences": SLOTS}}
    return load_model(build_config(None, given, given_by="this program"))


def changes(options: argparse.Namespace, constants: dict[str, int]) -> Iterator[dict[str, int]]:
    """What to run instead of the kernel's constants, nothing first."""
    yield {}
    for name, values in (("AHEAD", options.ahead), ("BEFORE_X", options.before_x)):
        yield from ({name: value} for value in values if value != constants[name])
    for chunks in options.chunks if "SEQ" not in constants else []:
        slots = constants["SLOTS"] * piece_bytes(constants["CHUNKS"]) // piece_bytes(chunks)
        yield from ({"CHUNKS": chunks, "SLOTS": slots, "AHEAD": ahead} for ahead in (2, 3) if ahead < slots)


def milliseconds(model: LanguageModel, cache: StateCache, sequences: int) -> list[float]:
    """Of a step, of each replay."""
    device = model.embedding.weight.device
    places = torch.arange(sequences + 1, dtype=torch.int32, device=device)
    batch = RaggedBatch(
        places[:-1].long() + 7, places, places[:-1], places[:-1].long() * 0, decode=True, pages=None
    )
    model(batch, cache.state)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(STEPS):
            model(batch, cache.state)
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
    model = it.model
    if len(model.stacks) != 1:
        sys.exit(f"{name}: the log says why its layers are not in one kernel here")
    cache = StateCache(
        model.state_shapes(), max_sequences=SLOTS, max_tokens=1, dtype=it.dtype, state_dtype=torch.float32,
        device=it.device,
    )  # fmt: skip
    stacks, (stack,) = model.stacks, model.stacks
    weights = sum(t.nbytes for layer in stack.layers for t in layer.all())
    states = 2 * sum(state.ssm[0].nbytes for state in cache.state.mixers)
    for sequences in options.sequences:
        most = min((most for most in stack.sizes if most >= sequences), default=0)
        constants = stack.sizes[most] if most else {}
        for change in [None, *(changes(options, constants) if most else [])]:
            model.stacks = stacks if change is not None else []
            if change is not None:
                stack.sizes[most] = constants | change
            times = milliseconds(model, cache, sequences)
            yield {
                "model": name, "degree": int(os.environ.get("WORLD_SIZE", "1")), "sequences": sequences,
                "way": "layer by layer" if change is None else "one kernel", **(change or {}),
                "ms": round(times[len(times) // 2], 4), "least": round(times[0], 4),
                "floor": round(1e3 * (weights + sequences * states) / COPY, 4),
                **({"constants": constants} if change == {} else {}),
            }  # fmt: skip
        if most:
            stack.sizes[most] = constants
    model.stacks = stacks


def main() -> None:
    """Run all models; rank 0 prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["mamba-2.8b", "falcon-mamba-7b"])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--ahead", type=int, nargs="*", default=[])
    parser.add_argument("--before-x", type=int, nargs="*", default=[])
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
