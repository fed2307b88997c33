"""Check and time forms of the selective scan on one GPU: `python -m tests.gpu.bench_scan results.json`.

Every form is checked against float64 on some channels, and for equal bits from run to run, in memory filled
with NaN; then timed by CUDA graphs that rotate over input sets larger than the L2 cache, against mamba-ssm
where it is installed. `--seconds` bounds the run: the results are written after each shape, and a second run
with the same file measures what is missing. `--forms 256,1,1,0,4,0,0 ...` adds forms (`Form`'s fields in
their order), `--shapes 8x8192x5120 ...` takes only some; `--out FOLDER` adds the chosen forms to the
report there. `--once 8x8192x5120` runs one form three times, for a profiler.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.joined_report import circumstances
from ssm_dist.kernels import gluon_form, gluon_scan, triton_scan
from ssm_dist.kernels.gluon_form import Form, cut_up, even
from ssm_dist.provenance import command
from tests.gpu.scan_report import report

Shape = tuple[int, int, int]
SHAPES: list[Shape] = [
    (8, 8192, 5120), (1, 8192, 5120), (1, 2048, 5120), (8, 2048, 5120), (8, 2048, 2560), (8, 2048, 1280),
    (1, 8192, 1280), (1, 2048, 1280), (8, 8192, 8192), (1, 32768, 5120), (1, 32768, 1280), (8, 8192, 1280),
    (4, 2048, 5120), (1, 8192, 2560), (1, 2048, 2560),
]  # fmt: skip
"""Sequences, tokens of each, channels; the most telling first."""
WORKERS = 12
DEVICE = "cuda"
Run = Callable[..., Tensor]


def inputs(
    lengths: list[int], channels: int, states: int = 16, groups: int = 1, dtype: torch.dtype = torch.bfloat16
) -> list[Any]:
    """Arguments as a layer gives them: z and B, C are views, and what lies beside them is NaN."""
    tokens, rank = sum(lengths), channels // 32 * 2
    packed = torch.full((tokens, 2 * channels), torch.nan, dtype=dtype, device=DEVICE)
    packed[:, channels:].normal_()
    projected = torch.full((tokens, groups, rank + 2 * states), torch.nan, dtype=dtype, device=DEVICE)
    projected[:, :, rank:].normal_()
    x = torch.randn(tokens, channels, dtype=dtype, device=DEVICE)
    dt = torch.randn(tokens, channels, dtype=dtype, device=DEVICE)
    A_log = torch.arange(1, states + 1, device=DEVICE).float().log().repeat(channels, 1)
    A_log += 0.1 * torch.randn_like(A_log)
    skip, bias = torch.randn(2, channels, device=DEVICE)
    slots = torch.randperm(len(lengths) + 2, device=DEVICE, dtype=torch.int32)[: len(lengths)]
    state = torch.randn(len(lengths) + 2, channels, states, device=DEVICE)
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    B, C = projected[:, :, rank : rank + states], projected[:, :, rank + states :]
    return [x, dt, A_log, B, C, skip, packed[:, channels:], bias - 3, state, offsets, slots]


def exact(arguments: list[Any], lengths: list[int], some: Tensor) -> tuple[Tensor, Tensor]:
    """Output (T, some) and states (S, some, N) of some channels in float64, by doubling spans of tokens."""
    x, dt, A_log, B, C, skip, z, bias, state, offsets, slots = arguments
    groups = some * B.shape[1] // x.shape[1]
    x, dt, z, A = x[:, some].double(), dt[:, some].double(), z[:, some].double(), -A_log[some].double().exp()
    step = torch.nn.functional.softplus(dt + bias[some].double(), threshold=1e9)[..., None]
    decay, states = torch.exp(step * A), step * x[..., None] * B[:, groups].double()
    final = state[slots.long()][:, some].double()
    live = torch.tensor(lengths, device=x.device) > 0
    begins, ends = offsets[:-1].long()[live], offsets[1:].long()[live]
    states[begins] += decay[begins] * final[live]
    decay[begins] = 0
    span = 1
    while span < max(lengths):  # a state then holds what `span` tokens brought, and decay is over all of them
        states[span:] += decay[span:] * states[:-span]
        decay[span:] = decay[span:] * decay[:-span]
        span *= 2
    final[live] = states[ends - 1]
    y = (states * C[:, groups].double()).sum(-1) + skip[some].double() * x
    return y * torch.nn.functional.silu(z), final


def off(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def gluon(form: Form) -> Run:
    return lambda *arguments: gluon_scan.scan(*arguments, form)


def name_of(form: Form) -> str:
    fields = ",".join(str(int(v or 0)) for v in dataclasses.astuple(form))
    return f"gluon {fields}"


def parsed(form: str) -> Form:
    *fields, registers, cut = (int(n) for n in form.split(","))
    return Form(*fields, registers or None, cut)


def chosen_form(shape: Shape, streams: bool = True) -> Form:
    sequences, length, channels = shape
    return gluon_form.choose(sequences * length, sequences, channels, streams)


def forms_for(shape: Shape) -> list[Form]:
    """The chosen form, those that differ from it in one thing, and chunks for 1 to 5 warps a scheduler."""
    sequences, length, channels = shape
    chosen, warps = chosen_form(shape), sequences * -(-channels // 16)
    forms = [chosen]
    if chosen.chunk:
        parts = -(-(length + chosen.cut) // chosen.chunk)
        divisions = [divide(length, parts + more) for more in (-1, 0, 1) for divide in (cut_up, even)]
        forms += [dataclasses.replace(chosen, registers=most) for most in (96, 112)]
        forms += [dataclasses.replace(chosen, chunk=chunk, cut=cut) for chunk, cut in divisions]
    else:
        forms += [dataclasses.replace(chosen, stages=stages) for stages in (6, 8)]
    full = [int(share * gluon_form.SCHEDULERS / warps) + 1 for share in (1, 2, 3, 4, 5, 9)]
    chunks = [cut_up(length, parts) for parts in full if 3 <= parts <= length // 64]
    forms += [Form(chunk, 1, 1, 1, 4, None, cut) for chunk, cut in chunks]
    forms += [Form(0, 1, 1, 1, 4, 96)] if sequences * channels > 4000 else []
    return list(dict.fromkeys(forms))


def runs_for(shape: Shape, more: list[Form]) -> dict[str, Run]:
    return {name_of(form): gluon(form) for form in dict.fromkeys([*forms_for(shape), *more])}


def check(run: Run, arguments: list[Any], some: Tensor, wanted: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Errors of one run, and whether another gives the same bits; the memory that it gets holds NaN."""
    before = arguments[8].clone()
    torch.use_deterministic_algorithms(True)
    try:
        y = run(*arguments)
        after = arguments[8].clone()
        arguments[8].copy_(before)
        same = torch.equal(y, run(*arguments)) and torch.equal(after, arguments[8])
    finally:
        torch.use_deterministic_algorithms(False)
        arguments[8].copy_(before)
    named = arguments[-1].long()
    others = torch.ones(len(before), dtype=torch.bool, device=DEVICE).index_fill(0, named, False)
    y_off, state_off = off(y[:, some], wanted[0]), off(after[named][:, some], wanted[1])
    whole = bool(y.isfinite().all()) and torch.equal(after[others], before[others])
    good = y_off < 3e-3 and state_off < 1e-5 and same and whole
    return {"y": y_off, "state": state_off, "repeats": same, "whole": whole, "good": good}


def milliseconds(run: Run, sets: list[list[Any]]) -> float:
    """Median time of a call, from replays of a graph of about 8 ms that rotates over the input sets.

    A scan works on the states of its arguments: they are other ones after this.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run(*sets[0])
    torch.cuda.synchronize()
    start.record()
    run(*sets[-1])
    end.record()
    torch.cuda.synchronize()
    calls = max(1, min(60, int(8 / max(start.elapsed_time(end), 0.02))))
    calls = -(-calls // len(sets)) * len(sets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for k in range(calls):
            run(*sets[k % len(sets)])
    graph.replay()
    times = []
    for _ in range(5):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return sorted(times)[2]


def mamba_ssm(shape: Shape, copies: int) -> float | None:
    """Its CUDA scan's time on inputs in its own layout, (sequences, channels, tokens)."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    sequences, length, channels = shape

    def one() -> list[Any]:
        x, dt, z = torch.randn(3, sequences, channels, length, dtype=torch.bfloat16, device=DEVICE)
        B, C = torch.randn(2, sequences, 1, 16, length, dtype=torch.bfloat16, device=DEVICE)
        A = -torch.arange(1, 17, device=DEVICE).float().repeat(channels, 1)
        skip, bias = torch.randn(2, channels, device=DEVICE)
        return [x, dt, A, B, C, skip, z, bias - 3]

    def run(*arguments: Tensor) -> Tensor:
        y: Tensor = selective_scan_fn(*arguments, delta_softplus=True, return_last_state=True)[0]
        return y

    return milliseconds(run, [one() for _ in range(copies)])


EDGES: list[tuple[dict[str, Any], list[Form]]] = [
    ({"channels": 1296, "groups": 2}, [Form(0, 1, 1, 0, 4, 96), Form(112, 1, 1, 1, 4, None, 16)]),
    ({"channels": 1280, "dtype": torch.float16}, [Form(0, 1, 1, 0, 4, 96)]),
]
"""Right or wrong, on ragged sequences, without times."""


def edge_results() -> list[dict[str, Any]]:
    """Whether ragged batches, groups and half precision come out right."""
    lengths = [1000, 0, 1, 63, 2, 3, 517, 16]
    results = []
    for case, forms in EDGES:
        arguments = inputs(lengths, **case)
        some = torch.arange(0, case["channels"], max(1, case["channels"] // 61), device=DEVICE)
        wanted = exact(arguments, lengths, some)
        for form in forms:
            row: dict[str, Any] = {"shape": {k: str(v) for k, v in case.items()}, "form": name_of(form)}
            row |= attempt(partial(check, gluon(form), arguments, some, wanted))
            print("edge", row, flush=True)
            results.append(row)
    return results


def attempt(measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row's results, or that it failed: one broken form must not cost the others their run."""
    try:
        return measured()
    except Exception as error:
        traceback.print_exc()
        return {"good": False, "ms": float("inf"), "error": repr(error)[:300]}


def measure(run: Run, sets: list[list[Any]], some: Tensor, wanted: tuple[Tensor, Tensor]) -> dict[str, Any]:
    return check(run, sets[0], some, wanted) | {"ms": milliseconds(run, sets)}


def shape_results(shape: Shape, runs: dict[str, Run], deadline: float) -> list[dict[str, Any]]:
    """Check, then time, these forms at one shape; those still untimed at the deadline are left out."""
    sequences, length, channels = shape
    size = 2 * 4 * sequences * length * channels
    copies = max(1, min(8, -(-150_000_000 // size)))
    sets = [inputs([length] * sequences, channels) for _ in range(copies)]
    starts = [arguments[8].clone() for arguments in sets]
    some = torch.tensor([0, 1, 7, 8, 15, 16, 63, channels // 2 + 3, channels - 1], device=DEVICE)
    wanted = exact(sets[0], [length] * sequences, some)
    results: list[dict[str, Any]] = []
    for name, run in runs.items():
        if time.monotonic() > deadline:
            break
        for arguments, start in zip(sets, starts, strict=True):
            arguments[8].copy_(start)
        found = attempt(partial(measure, run, sets, some, wanted))
        results.append({"shape": list(shape), "form": name, **found})
    peer = mamba_ssm(shape, copies)
    floor = 19 * sequences * length * channels / (16 * 132 * 1.98e9) * 1e3
    return [row | {"floor_ms": floor, "mamba_ssm_ms": peer} for row in results]


def show(shape: Shape, rows: list[dict[str, Any]]) -> None:
    """A line for each form, the fastest first, the chosen one marked."""
    if not rows:
        return
    peer = rows[0]["mamba_ssm_ms"]
    print(f"\n{shape}: floor {rows[0]['floor_ms']:.3f} ms, mamba-ssm {peer} ms", flush=True)
    chosen = name_of(chosen_form(shape))
    for row in sorted(rows, key=lambda row: row["ms"]):
        errors = f"y {row.get('y', 9):.1e} state {row.get('state', 9):.1e}"
        marks = ("" if row["good"] else "WRONG ") + ("<- chosen" if row["form"] == chosen else "")
        print(
            f"  {row['ms']:8.4f} ms {(peer or 0) / row['ms']:5.2f}x  {row['form']:44s} {errors} {marks}",
            flush=True,
        )


def compiled(run: Run, case: dict[str, Any]) -> dict[str, Any]:
    return {"y": run(*inputs([80], **case))}


def compile_all(shapes: list[Shape], more: list[Form]) -> None:
    """All kernels into Triton's cache on disk, by processes that share what this one has imported."""
    todo: dict[str, tuple[Run, dict[str, Any]]] = {}
    for shape in shapes:
        for form in [*forms_for(shape), *more]:
            small = dataclasses.replace(form, chunk=min(form.chunk, 32), cut=0)
            todo.setdefault(name_of(small), (gluon(small), {"channels": shape[2]}))
    for case, forms in EDGES:
        for form in forms:
            todo[f"{case} {name_of(form)}"] = (gluon(form), case)
    parts = [part for part in (list(todo.values())[k::WORKERS] for k in range(WORKERS)) if part]
    children = []
    for part in parts:
        child = os.fork()
        if not child:
            for run, case in part:
                attempt(partial(compiled, run, case))
            torch.cuda.synchronize()
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


@functools.cache
def around() -> dict[str, Any]:
    """Where and by what call this was measured, on one GPU of the host."""
    call = command("python -m tests.gpu.bench_scan", sys.argv[1:])
    alone = {"hardware": f"1 x {torch.cuda.get_device_name()}", "call": call}
    return circumstances(["torch", "triton", "mamba_ssm"]) | alone


def sized(text: str) -> Shape:
    sequences, length, channels = (int(n) for n in text.split("x"))
    return sequences, length, channels


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="?", type=Path, default=Path("bench_scan.json"))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--shapes", type=sized, nargs="+", default=SHAPES)
    parser.add_argument("--forms", type=parsed, nargs="+", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--once", type=sized)
    options = parser.parse_args()
    if options.once:
        form = (*options.forms, chosen_form(options.once))[0]
        sequences, length, channels = options.once
        arguments = inputs([length] * sequences, channels)
        for _ in range(3):
            gluon_scan.scan(*arguments, form)
        return torch.cuda.synchronize()

    compile_all(options.shapes, options.forms)
    versions = f"torch {torch.__version__} triton {triton_scan.triton.__version__}"
    print(torch.cuda.get_device_name(), versions, f"compiled in {time.monotonic() - began:.1f} s", flush=True)
    torch.manual_seed(0)
    old = json.loads(options.results.read_text()) if options.results.exists() else []
    results = [*old] if old else edge_results()
    for shape in options.shapes:
        known = [row for row in results if row["shape"] == list(shape)]
        runs = runs_for(shape, options.forms)
        missing = {name: run for name, run in runs.items() if name not in [row["form"] for row in known]}
        if missing and time.monotonic() < began + options.seconds:
            found = shape_results(shape, missing, deadline=began + options.seconds)
            show(shape, known + found)
            results += found
            options.results.write_text(json.dumps(results, indent=1))
            if options.out:
                sized_case = "x".join(map(str, shape))
                report(options.out, known + found, {sized_case: name_of(chosen_form(shape))}, around())
    wrong = [row for row in results if not row["good"]]
    print(f"{len(results)} rows, {len(wrong)} wrong, {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
