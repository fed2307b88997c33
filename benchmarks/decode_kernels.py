"""Linear layers of few rows by configuration, and whole decode steps by what serves them, on one GPU.

    python -m benchmarks.decode_kernels [--seconds 90] [--parts joint steps layers] [--out FILE.json]

joint: decode steps of a model with random weights, from token ids to logits, captured in a CUDA graph, by
configurations of its layers; of the share of one of several ranks with --degree, which then sums nothing.
steps: of whole models, by what serves them. Both in milliseconds. layers: the linear layers that a rank
holds, by the candidates of the tuning table and by torch, in a graph of calls on so many weights that the L2
cache holds none of them; microseconds a call. A layer alone can mislead: its weight may come while the call
before it runs, and its input from the L1 cache. The floor is the time to read the weights at a large copy's
rate. What the time allowed leaves out is said. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from benchmarks.decode_candidates import DEALT, HELD, MATRIX, ROWS, SEQUENCES, VECTOR, of_steps
from ssm_dist import kernels
from ssm_dist.kernel_benchmark.cases import linear_layers
from ssm_dist.kernel_benchmark.clock import Call, Clock
from ssm_dist.kernel_benchmark.program import environment, table
from ssm_dist.kernels import backend, dependent_launch, triton_linear, tuning
from ssm_dist.kernels.gluon_linear_form import held_form, held_op
from ssm_dist.models.batch import MixerState, ModelState, RaggedBatch
from ssm_dist.models.language_model import LanguageModel
from ssm_dist.models.mixer import arrange_weights
from ssm_dist.registry import preset

LAYERS = [("mamba-2.8b", 1), ("mamba-2.8b", 4), ("falcon-mamba-7b", 1), ("mamba-2.8b", 2),
          ("falcon-mamba-7b", 4), ("zamba-7b", 1), ("zamba-7b", 4)]  # fmt: skip
"""Model and degree, in the order in which the time is spent."""
STEPS = [("mamba-2.8b", 4), ("mamba-2.8b", 16), ("mamba-2.8b", 1), ("falcon-mamba-7b", 4),
         ("falcon-mamba-7b", 16), ("falcon-mamba-7b", 1)]  # fmt: skip
"""Model and sequences."""
VARIANTS = {
    "torch": (["linear", "projected_state_update"], True),
    "ordinary": ([], True),
    "separate update": (["projected_state_update"], False),
    "dependent": ([], False),
}
"""Name -> ops served by their definitions, and whether kernels are launched in the ordinary way."""
PARTS = ["joint", "steps", "layers"]
WEIGHTS = 200e6
"""Bytes of weights in a graph at least."""


@contextlib.contextmanager
def variant(name: str) -> Iterator[None]:
    """What serves a decode step: see VARIANTS."""
    definitions, ordinary = VARIANTS[name]
    launches = dependent_launch.ordinary_launches() if ordinary else contextlib.nullcontext()
    with launches, backend.using("triton", "cuda", definitions=definitions):
        yield


def random_model(name: str, degree: int = 1) -> LanguageModel:
    """A rank's share of that preset, of random numbers of a size that keeps the activations finite."""
    spec, config = preset(name)
    config = dataclasses.replace(config, d_inner=config.d_inner // degree)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = spec.build(config)
    torch.set_default_dtype(torch.float32)
    for parameter_name, parameter in model.named_parameters():
        wide = parameter.dim() > 1 and not parameter_name.endswith("A_log")
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if wide else 0.5)
    arrange_weights(model)
    return model


def step_of(model: LanguageModel, sequences: int) -> tuple[Call, int]:
    """A decode step of some sequences, and the bytes of weights and states that it must move."""
    shapes, slots = model.state_shapes(), torch.arange(sequences, device="cuda", dtype=torch.int32)
    states = [
        MixerState(
            torch.zeros(sequences, *shapes.conv, device="cuda", dtype=torch.bfloat16),
            torch.zeros(sequences, *shapes.ssm, device="cuda"),
        )
        for _ in range(shapes.layers)
    ]
    tokens = torch.randint(500, (sequences,), device="cuda")
    offsets = torch.arange(sequences + 1, device="cuda", dtype=torch.int32)
    batch = RaggedBatch(tokens, offsets, slots, torch.zeros_like(tokens), decode=True)

    def step() -> Tensor:
        return model.head(model(batch, ModelState(states)))

    moved = sum(p.nbytes for p in model.parameters()) + 2 * sum(s.conv.nbytes + s.ssm.nbytes for s in states)
    return step, moved


def step_rows(clock: Clock, copy: float, deadline: float) -> Iterator[dict[str, Any]]:
    """Milliseconds of a step by variant, until the deadline; the floor is that of a copy of as many bytes."""
    loaded = ""
    for name, sequences in STEPS:
        if time.monotonic() > deadline:
            print(f"left out: {name}, {sequences} sequences", file=sys.stderr)
            continue
        if name != loaded:
            model, loaded = random_model(name), name
        step, moved = step_of(model, sequences)
        row: dict[str, Any] = {"model": name, "sequences": sequences, "floor": 1e3 * moved / copy}
        for kind in VARIANTS:
            with variant(kind):
                row[kind] = 1e3 * clock.seconds([step])
        yield row


def joint_rows(
    model: LanguageModel, layers: dict[str, tuple[int, int]], chosen: list[int], clock: Clock, deadline: float
) -> Iterator[dict[str, Any]]:
    """Milliseconds of a step by configuration of some ops, the others as recorded, until the deadline."""
    for sequences in chosen:
        step = step_of(model, sequences)[0]
        for name, configs in {"recorded": {}, **of_steps(layers, sequences), "recorded again": {}}.items():
            if time.monotonic() > deadline:
                print(f"left out: {sequences} sequences, {name}", file=sys.stderr)
                continue
            with contextlib.ExitStack() as stack:
                for op, config in configs.items():
                    stack.enter_context(tuning.forced(op, config))
                stack.enter_context(contextlib.suppress(Exception))  # too much shared memory
                yield {"sequences": sequences, "config": name, "ms": 1e3 * clock.seconds([step])}


@contextlib.contextmanager
def linear_by(op: str, config: dict[str, int], held: str) -> Iterator[None]:
    """Linear layers by one configuration of an op, with the weight in registers only if that is `held`."""
    with tuning.forced(op, config), contextlib.nullcontext() if op == held else tuning.forced(held, {}):
        yield


def candidates_row(
    shape: tuple[int, int], rows: int, clock: Clock, weights: list[Tensor], copy: float
) -> dict[str, Any]:
    """Microseconds of one layer by configuration; the best once more without dependent launches."""
    x = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
    calls: list[Call] = [functools.partial(kernels.linear, x, weight) for weight in weights]
    torchs: list[Call] = [functools.partial(F.linear, x, weight) for weight in weights]
    few = rows <= triton_linear.VECTOR_ROWS
    op = triton_linear.vector_op(rows) if few else triton_linear.matrix_op(rows, weights[0])
    candidates = {1: VECTOR, 4: [{}, *VECTOR[:5]], 16: MATRIX}.get(
        rows, MATRIX + DEALT if weights[0].numel() < 3e6 else MATRIX
    )
    held, found = held_op(rows), list[tuple[float, dict[str, int], str]]()
    ways = [(op, config) for config in candidates] + [(held, config) for config in ([] if few else HELD)]
    for kind, config in ways:
        with linear_by(kind, config, held), contextlib.suppress(Exception):  # too much shared memory
            if kind == op or held_form(x, weights[0]):
                found.append((1e6 * clock.seconds(calls), config, kind))
    found.sort(key=lambda way: way[0])
    _, config, kind = found[0]
    with linear_by(kind, config, held), dependent_launch.ordinary_launches():
        ordinary = 1e6 * clock.seconds(calls)
    floor = 1e6 * weights[0].nbytes / copy
    return {
        "N": shape[0], "K": shape[1], "rows": rows, "floor": floor,
        "torch": 1e6 * clock.seconds(torchs), "ordinary": ordinary, "dependent": found[0][0],
        "of_floor": floor / found[0][0], "candidates": found,
    }  # fmt: skip


def layer_rows(clock: Clock, copy: float, deadline: float) -> Iterator[dict[str, Any]]:
    """Rows of all shapes, each once, until the deadline."""
    seen: set[tuple[int, int]] = set()
    for name, degree in LAYERS:
        config = preset(name)[1]
        channels = config.d_inner // degree
        for shape in (*linear_layers(config, degree), (channels, config.dt_rank)):
            if shape in seen:
                continue
            seen.add(shape)
            count = min(256, max(2, round(WEIGHTS / (2 * shape[0] * shape[1]))))
            weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
            for rows in ROWS:
                if time.monotonic() > deadline:
                    print(f"left out: {name} / {degree}, {shape}, {rows} rows", file=sys.stderr)
                    continue
                yield candidates_row(shape, rows, clock, weights, copy)


def _named(config: dict[str, int]) -> str:
    return " ".join(f"{k}={v}" for k, v in config.items())


@torch.inference_mode()
def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=90, help="after which no new case starts")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--model", default="mamba-2.8b", help="of the steps by configuration")
    parser.add_argument("--degree", type=int, default=1, help="theirs: a rank's share, without the sums")
    parser.add_argument("--sequences", type=int, nargs="+", default=SEQUENCES, help="theirs")
    parser.add_argument("--out", type=Path, help="write the JSON document here too")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    device = torch.device("cuda")
    backend.select("triton", device)
    clock = Clock(device)
    copy = clock.copy_rate()
    report: dict[str, Any] = {"environment": environment(device), "copy_bytes_s": copy}
    times = dict.fromkeys(("floor", "torch", "ordinary", "dependent"), ".2f")
    console = Console(width=180)
    if "joint" in options.parts:
        model = random_model(options.model, options.degree)
        in_proj, out_proj, x_proj, _ = linear_layers(preset(options.model)[1], options.degree)
        layers = {"in_proj": in_proj, "out_proj": out_proj, "x_proj": x_proj}
        rows = joint_rows(model, layers, options.sequences, clock, deadline)
        report["joint"] = [{"model": options.model, "degree": options.degree, **row} for row in rows]
        columns = {"sequences": "d", "config": "", "ms": ".3f"}
        console.print(table(report["joint"], f"Steps of {options.model} / {options.degree}", columns))
        del model
    if "steps" in options.parts:
        report["steps"] = list(step_rows(clock, copy, deadline))
        columns = {"model": "", "sequences": "d", **times, "separate update": ".2f"}
        console.print(table(report["steps"], "Decode steps, ms", columns))
    if "layers" in options.parts:
        report["layers"] = list(layer_rows(clock, copy, deadline))
        best = [
            {**row, "best": f"{row['candidates'][0][2]} {_named(row['candidates'][0][1])}"}
            for row in report["layers"]
        ]
        columns = {"N": "d", "K": "d", "rows": "d", **times, "of_floor": ".0%", "best": ""}
        console.print(table(best, "Linear layers, us", columns))
    document = json.dumps(report)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
