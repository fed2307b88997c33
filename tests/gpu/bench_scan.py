"""Check and time every form of the selective scan on one GPU: `python -m tests.gpu.bench_scan results.json`.

Every form is checked against float64 on some channels, and for equal bits from run to run, in memory filled
with NaN; then timed by CUDA graphs that rotate over input sets larger than the L2 cache, against mamba-ssm
where it is installed. `--once 8x8192x5120` runs one form three times, for a profiler. Under two minutes on
an H200.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssm_dist.kernels import gluon_scan, triton_scan
from ssm_dist.kernels.gluon_scan import Form

SHAPES = [
    (8, 8192, 5120), (1, 2048, 5120), (1, 8192, 5120), (1, 32768, 5120), (8, 2048, 5120), (1, 2048, 1280),
    (1, 8192, 1280), (1, 32768, 1280), (8, 8192, 1280), (8, 8192, 8192), (1, 8192, 2560),
]  # fmt: skip
"""Sequences, tokens of each, channels."""
MAMBA_SSM = dict(
    zip(SHAPES, [6.43, 0.197, 0.919, 3.68, 1.45, 0.068, 0.276, 1.11, 1.67, 10.3, None], strict=True)
)
"""Its milliseconds as once measured, for where it is not installed."""
WORKERS = 10
DEVICE = "cuda"


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
    """Output (T, some) and states (S, some, N) of some channels in float64, all sequences side by side."""
    x, dt, A_log, B, C, skip, z, bias, state, offsets, slots = arguments
    groups = some * B.shape[1] // x.shape[1]
    x, dt, z, A = x[:, some].double(), dt[:, some].double(), z[:, some].double(), -A_log[some].double().exp()
    step = torch.nn.functional.softplus(dt + bias[some].double(), threshold=1e9)
    s = state[slots.long()][:, some].double()
    y = torch.empty_like(x)
    starts, lasts = offsets[:-1].long(), torch.tensor(lengths, device=DEVICE)
    live: Any = slice(None)
    for t in range(max(lengths)):
        if t >= min(lengths):
            live = lasts > t
        rows = starts[live] + t
        d = step[rows][..., None]
        s[live] = torch.exp(d * A) * s[live] + d * x[rows][..., None] * B[rows][:, groups].double()
        y[rows] = (s[live] * C[rows][:, groups].double()).sum(-1)
    return (y + skip[some].double() * x) * torch.nn.functional.silu(z), s


def off(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


Run = Callable[..., Tensor]


def gluon(form: Form) -> Run:
    return lambda *arguments: gluon_scan.scan(*arguments, form)


def plain(chunk: int) -> Run:
    return lambda *arguments: triton_scan.scan(*arguments, chunk)


def name_of(form: Form) -> str:
    return f"gluon chunk={form.chunk} warps={form.warps} depth={form.depth} extra={form.extra}"


def forms_for(sequences: int, length: int, channels: int) -> dict[str, Run]:
    """The chosen form, those that differ from it in one thing, and the plain ones."""
    chosen = gluon_scan.choose(sequences * length, sequences, channels)
    chunks = {0, chosen.chunk} | {
        16 * -(-length // (16 * k)) for k in (3, 4, 5, 6, 7, 8, 9, 12, 16, 24, 32, 48)
    }
    if sequences > 1 and channels > 4096:
        chunks = {0}
    forms = [chosen]
    forms += [dataclasses.replace(chosen, chunk=n) for n in sorted(chunks) if n == 0 or n >= 64]
    forms += [dataclasses.replace(chosen, warps=n) for n in (1, 2, 4)]
    forms += [dataclasses.replace(chosen, depth=n) for n in (1, 2)]
    forms += [dataclasses.replace(chosen, extra=n) for n in (0, 1, 2, 3)]
    forms += [dataclasses.replace(chosen, warps=1, extra=n) for n in (0, 1, 2)]
    runs = {name_of(form): gluon(form) for form in dict.fromkeys(forms)}
    plain_chunk = triton_scan.chunk_tokens(sequences * length, sequences, channels)
    for chunk in {0, plain_chunk}:
        runs[f"plain chunk={chunk}"] = plain(chunk)
    return runs


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
    """Median time of a call, from replays of a graph of about 15 ms that rotates over the input sets."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run(*sets[0])
    torch.cuda.synchronize()
    start.record()
    run(*sets[-1])
    end.record()
    torch.cuda.synchronize()
    calls = max(1, min(60, int(15 / max(start.elapsed_time(end), 0.02))))
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


def mamba_ssm(sequences: int, length: int, channels: int, copies: int) -> float | None:
    """Its CUDA scan's time on inputs in its own layout, (sequences, channels, tokens)."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None

    def one() -> list[Any]:
        x, dt, z = torch.randn(3, sequences, channels, length, dtype=torch.bfloat16, device=DEVICE)
        B, C = torch.randn(2, sequences, 1, 16, length, dtype=torch.bfloat16, device=DEVICE)
        A = -torch.arange(1, 17, device=DEVICE).float().repeat(channels, 1)
        return [
            x,
            dt,
            A,
            B,
            C,
            torch.randn(channels, device=DEVICE),
            z,
            torch.randn(channels, device=DEVICE) - 3,
        ]

    def run(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
    ) -> Tensor:
        return selective_scan_fn(x, dt, A, B, C, D, z, bias, delta_softplus=True, return_last_state=True)[0]

    return milliseconds(run, [one() for _ in range(copies)])


EDGES: list[tuple[dict[str, Any], list[Form]]] = [
    ({"channels": 5120}, [Form(), Form(256), Form(256, 1, 2, 2)]),
    ({"channels": 1284, "groups": 2}, [Form(), Form(112, 2, 2, 0)]),
    ({"channels": 1280, "dtype": torch.float16}, [Form(), Form(128)]),
    ({"channels": 256, "states": 32}, [Form(), Form(128)]),
    ({"channels": 256, "states": 64}, [Form(), Form(128)]),
]
"""Right or wrong, on ragged sequences, without times."""


def edge_runs(case: dict[str, Any], forms: list[Form]) -> dict[str, Run]:
    runs = {name_of(form): gluon(form) for form in forms}
    if "states" not in case:
        runs |= {"plain chunk=0": plain(0), "plain chunk=128": plain(128)}
    return runs


def edge_results() -> list[dict[str, Any]]:
    """Whether ragged batches, groups, half precision and more states come out right."""
    lengths = [1000, 0, 1, 63, 2, 3, 517, 16]
    results = []
    for case, forms in EDGES:
        arguments = inputs(lengths, **case)
        some = torch.arange(0, case["channels"], max(1, case["channels"] // 61), device=DEVICE)
        wanted = exact(arguments, lengths, some)
        for name, run in edge_runs(case, forms).items():
            row: dict[str, Any] = {"case": {k: str(v) for k, v in case.items()}, "form": name}
            try:
                row |= check(run, arguments, some, wanted)
            except Exception as error:
                row |= {"good": False, "error": repr(error)}
                traceback.print_exc()
            print("edge", row, flush=True)
            results.append(row)
    return results


def shape_results(sequences: int, length: int, channels: int, deadline: float) -> list[dict[str, Any]]:
    """Check, then time, all forms at one shape; the forms still untimed at the deadline are left out."""
    size = 2 * 4 * sequences * length * channels
    copies = max(1, min(8, -(-150_000_000 // size)))
    sets = [inputs([length] * sequences, channels) for _ in range(copies)]
    some = torch.tensor([0, 1, 7, 8, 15, 16, 63, channels // 2 + 3, channels - 1], device=DEVICE)
    wanted = exact(sets[0], [length] * sequences, some)
    floor = 19 * sequences * length * channels / (16 * 132 * 1.98e9) * 1e3
    results: list[dict[str, Any]] = []
    for name, run in forms_for(sequences, length, channels).items():
        if time.monotonic() > deadline:
            break
        row: dict[str, Any] = {"shape": [sequences, length, channels], "form": name}
        try:
            row |= check(run, sets[0], some, wanted)
            row["ms"] = milliseconds(run, sets)
        except Exception as error:
            row |= {"good": False, "ms": float("inf"), "error": repr(error)}
            traceback.print_exc()
        results.append(row)
    peer = mamba_ssm(sequences, length, channels, copies)
    then = MAMBA_SSM[sequences, length, channels]
    for row in results:
        row |= {"floor_ms": floor, "mamba_ssm_ms": peer, "mamba_ssm_once_ms": then}
    print(
        f"\n{sequences} x {length} x {channels}: floor {floor:.3f} ms, mamba-ssm {peer} (once {then}) ms",
        flush=True,
    )
    for n, row in enumerate(sorted(results, key=lambda row: row["ms"])):
        chosen = "<- chosen" if row is results[0] else ""
        if n < 14 or chosen or "plain" in row["form"] or not row["good"]:
            fine = "ok" if row["good"] else f"WRONG {row}"
            times = (peer or then or 0) / row["ms"]
            errors = f"y {row.get('y', 9):.1e} state {row.get('state', 9):.1e}"
            print(
                f"  {row['ms']:8.4f} ms {times:5.2f}x  {row['form']:48s} {errors} {fine} {chosen}", flush=True
            )
    return results


def compile_all(part: int) -> None:
    """Compile this worker's share of all kernels into Triton's cache on disk."""
    todo: dict[str, tuple[Run, dict[str, Any]]] = {}
    for shape in SHAPES:
        for name, run in forms_for(*shape).items():
            kind = name.split("warps")[-1] + str("chunk=0" in name)
            todo.setdefault(kind, (run, {"channels": shape[2]}))
    for case, forms in EDGES:
        for name, run in edge_runs(case, forms).items():
            todo[f"{case} {name}"] = (run, case)
    for run, case in list(todo.values())[part::WORKERS]:
        run(*inputs([80], **case))
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", nargs="?", default="bench_scan.json")
    parser.add_argument("--once", help="a shape as 8x8192x5120: run its chosen form three times")
    parser.add_argument("--form", help="chunk,warps,depth,extra for --once")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=110)
    options = parser.parse_args()
    if options.compile is not None:
        return compile_all(options.compile)
    if options.once:
        sequences, length, channels = (int(n) for n in options.once.split("x"))
        form = gluon_scan.choose(sequences * length, sequences, channels)
        if options.form:
            form = Form(*(int(n) for n in options.form.split(",")))
        arguments = inputs([length] * sequences, channels)
        for _ in range(3):
            gluon_scan.scan(*arguments, form)
        return torch.cuda.synchronize()

    began = time.monotonic()
    print(
        torch.cuda.get_device_name(),
        "torch",
        torch.__version__,
        "triton",
        triton_scan.triton.__version__,
        flush=True,
    )
    command = [sys.executable, "-m", "tests.gpu.bench_scan", "--compile"]
    workers = [subprocess.Popen([*command, str(part)]) for part in range(WORKERS)]
    print(
        "compilation:", [worker.wait() for worker in workers], f"{time.monotonic() - began:.1f} s", flush=True
    )
    torch.manual_seed(0)
    results = []
    try:
        results += edge_results()
        for shape in SHAPES:
            results += shape_results(*shape, deadline=began + options.seconds)
    finally:
        with open(options.results, "w") as file:
            json.dump(results, file, indent=1)
    wrong = [row for row in results if not row["good"]]
    print(f"{len(results)} rows, {len(wrong)} wrong, {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
