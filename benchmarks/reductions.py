"""Latency of every path and codec of the reductions, against NCCL in the same run, inside CUDA graphs.

    torchrun --standalone --nproc-per-node 2 benchmarks/reductions.py --out benchmarks/reductions/2xH100
    torchrun --standalone --nproc-per-node 2 benchmarks/reductions.py --no-p2p --out .../2xH100-no-p2p

Each case captures several calls of each way in a graph; the graphs are replayed in turns, and a time is the
median of the repeats, of the slowest rank. `nccl` is NCCL's all-reduce in place, and nothing else (with its
norm in the fused section); `all_reduce` is the same by our operator, into a fresh tensor; `auto` is what a
model does, which may sum in place. Beside a time: the relative L2 error against the float32 sum, and whether
all ranks hold the same bits.
Written after every case: OUT.json, OUT.md and, from the section plain, OUT.table.json, which is for
`[reduction] table`.

No new case begins after --seconds; a case that fails is recorded with its error, and one that hangs ends the
run after --case-seconds, while what was measured stays. On a CPU it tries the program, at tiny sizes.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from reductions_compiled import compile_ahead
from reductions_programs import COMPILED, programs
from reductions_report import markdown, one_line, table_of_rows
from reductions_ways import WAYS, Run, Way, fused_run, norm_inputs, normalised, normed, plain_run, small_run
from torch import Tensor

from ssm_dist.kernels import backend
from ssm_dist.parallel import TensorParallel
from ssm_dist.parallel.collectives import Reductions, carrier, wait_for_device
from ssm_dist.parallel.collectives.tables import table_to_json
from ssm_dist.provenance import commit
from ssm_dist.version import __version__

START = time.monotonic()
WIDTH = 2560
ROWS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 16384, 65536, 104858)
"""5 KB to 512 MB in rows of 2560 bfloat16."""
TOKENS, WIDTHS, LONG_TOKENS = (1, 8, 64, 256), (2560, 4096), (1024, 4096, 16384, 65536)
SMALL_WIDTHS, SMALL_ROWS = (192, 264, 288), (1, 8, 64, 256)
"""x_proj of mamba-2.8b, zamba-7b and falcon-mamba-7b: the ranks of dt, B and C."""
PUSHED_BYTES = 6e6
"""Beyond them, one_shot and two_shot are not measured."""
CODED_BYTES = 3e5
"""Up to them, nothing is quantised."""


@dataclass
class Repeated:
    """Several calls of one way, to be timed together."""

    call: Run
    """The graph replays on the memory that it holds."""
    calls: int
    graph: torch.cuda.CUDAGraph | None

    def seconds(self, group: str, device: torch.device) -> float:
        """Of one call."""
        if self.graph is None:
            begin = time.perf_counter()
            for _ in range(self.calls):
                self.call()
            return (time.perf_counter() - begin) / self.calls
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        self.graph.replay()
        events[1].record()
        wait_for_device(group, device)
        return float(events[0].elapsed_time(events[1])) / 1e3 / self.calls


@dataclass
class Bench:
    """One rank's side of the run."""

    tp: TensorParallel
    device: torch.device
    options: argparse.Namespace
    report: dict[str, Any]
    broken: str = ""
    """Why shared memory is not used any more."""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def ways(self, size: float) -> dict[str, Way]:
        """What can serve messages of so many bytes here."""
        shared = "shared" in carrier(self.tp.group) and not self.broken
        kept = {}
        for name, (codec, group_size, algorithm) in WAYS.items():
            if algorithm in ("one_shot", "two_shot", "bulk") and not shared:
                continue
            if algorithm in ("one_shot", "two_shot") and size > PUSHED_BYTES:
                continue
            if codec != "none" and size <= CODED_BYTES:
                continue
            kept[name] = (codec, group_size, algorithm)
        return kept

    def case(
        self, section: str, shape: tuple[int, int], make: Callable[..., Run], exact: Callable[..., Tensor],
        ways: dict[str, Way] | None = None,
    ) -> None:  # fmt: skip
        """Measure all ways of one sum of `shape`; what `exact` makes of the float32 sum is the truth."""
        if self.time_is_up():
            return
        x = torch.randn(*shape, device=self.device, dtype=torch.bfloat16)
        row: dict[str, Any] = {"section": section, "rows": shape[0], "width": shape[1], "bytes": x.nbytes}
        whole = x.float()
        dist.all_reduce(whole)
        truth = exact(whole)
        del whole
        repeated: dict[str, Repeated] = {}
        for name, way in (ways or self.ways(x.nbytes)).items():
            if self.broken and way[2] not in ("nccl", "all_reduce", "exchange"):
                continue
            faulthandler.dump_traceback_later(self.options.case_seconds, exit=True)
            try:
                run = make(x, self.tp, *way)
                row[name] = self.checked(run, truth)
                repeated[name] = self.repeated(run, x.nbytes)
            except Exception as error:
                row[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
                if way[2] not in ("nccl", "all_reduce", "exchange"):
                    self.broken = f"{section} {shape} {name}"
        faulthandler.dump_traceback_later(self.options.case_seconds, exit=True)
        for name, us in self.microseconds(repeated).items():
            row[name]["us"] = us
        faulthandler.cancel_dump_traceback_later()
        self.rows.append(row)
        self.write(row)

    def time_is_up(self) -> bool:
        """Whether rank 0 says so."""
        spent = torch.tensor(time.monotonic() - START, device=self.device)
        dist.broadcast(spent, 0)
        return float(spent) > self.options.seconds

    def checked(self, run: Run, truth: Tensor) -> dict[str, Any]:
        """Error, and whether the bits agree."""
        got = run()
        wait_for_device(self.tp.group, self.device)
        error = float((got.float() - truth).norm() / truth.norm())
        return {"error": error, "same": self.same_on_all_ranks(got)}

    def microseconds(self, ways: dict[str, Repeated]) -> dict[str, float]:
        """Of a call of each: the median of the repeats on the slowest rank. All take turns, so that what
        disturbs the host for a moment is no single way's."""
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(self.options.repeats + 2):
            for name, way in ways.items():
                dist.barrier()
                times[name].append(1e6 * way.seconds(self.tp.group, self.device))
        medians = [statistics.median(repeats[2:]) for repeats in times.values()]
        slowest = torch.tensor(medians, device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return {name: round(us, 2) for name, us in zip(times, slowest.tolist(), strict=True)}

    def same_on_all_ranks(self, x: Tensor) -> bool:
        """Whether all ranks hold the same bits, by two sums of them."""
        bits = x.contiguous().view(torch.int16).flatten()
        place = (torch.arange(len(bits), device=x.device) % 9973 + 1).float()
        mine = torch.stack([bits.sum(), (bits * place).double().sum().long()])
        sums = [torch.empty_like(mine) for _ in range(self.tp.degree)]
        dist.all_gather(sums, mine)
        return all(torch.equal(mine, other) for other in sums)

    def repeated(self, call: Run, size: int) -> Repeated:
        """Several calls in a graph, or plain ones on a CPU."""
        if self.device.type == "cpu":
            return Repeated(call, 2, None)
        graph, calls = torch.cuda.CUDAGraph(), max(2, min(20, int(64e6 / size)))
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(calls):
                call()
        return Repeated(call, calls, graph)

    def write(self, row: dict[str, Any] | None = None) -> None:
        """Print a case, and rewrite the files."""
        if self.tp.rank > 0:
            return
        if row is not None:
            print(one_line(row), flush=True)
        spent = round(time.monotonic() - START, 1)
        document = self.report | {"seconds": spent, "broken": self.broken, "rows": self.rows}
        out: Path = self.options.out
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_name(f"{out.name}.json").write_text(json.dumps(document, indent=1) + "\n")
        out.with_name(f"{out.name}.md").write_text(markdown(document))
        table = table_of_rows(self.rows, self.tp.degree, "nccl" if self.device.type == "cuda" else "gloo")
        if table is not None:
            out.with_name(f"{out.name}.table.json").write_text(table_to_json(table))


def small(bench: Bench) -> None:
    """x_proj's sums, and what normalises dt, B and C after them in Falcon-Mamba."""
    for width in SMALL_WIDTHS:
        for rows in SMALL_ROWS:
            bench.case("small", (rows, width), plain_run, lambda whole: whole)
            if width == 288:
                bench.case("small, normalised", (rows, width), small_run, normalised)


def fused(bench: Bench, widths: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    """Sums with residual and norm; for long messages, the residual split between ranks."""
    for width in widths:
        for rows in tokens:
            given = norm_inputs(rows, width, bench.device)
            bench.case("fused", (rows, width), fused_run(*given), partial(normed, *given))


def main() -> None:
    """Run all sections that were asked for."""
    options = _options()
    if options.no_p2p:
        os.environ["NCCL_P2P_DISABLE"] = "1"
    gpu = torch.cuda.device_count() > 0 and not options.cpu
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    lengths = [rows for rows in (*options.rows, *LONG_TOKENS) if rows <= 65536]
    memory = (2 * max(WIDTHS), 2 * max(WIDTHS) * max(lengths))
    names = COMPILED if options.sections == ["programs"] else tuple(WAYS)
    children = compile_ahead(device, memory, not options.no_p2p, names) if gpu else None
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    backend.select("auto", device)
    torch.manual_seed(dist.get_rank())
    tp = TensorParallel.over_all_ranks(device.type, Reductions(timeout_seconds=options.timeout))
    if gpu and not options.no_p2p:
        tp.share_memory(max(lengths), max(WIDTHS), torch.bfloat16, device)
    report = {
        "ranks": tp.degree, "carrier": carrier(tp.group), "ssm_dist": __version__, "commit": commit(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if gpu else "CPU",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpu else "", "p2p": not options.no_p2p,
    }  # fmt: skip
    if children is not None:
        children.join()
    bench = Bench(tp, device, options, report)
    if tp.rank == 0:
        print(json.dumps(report), f"ready after {time.monotonic() - START:.0f} s", flush=True)
    if "fused" in options.sections:
        fused(bench, WIDTHS, TOKENS)
    if "plain" in options.sections:
        for rows in options.rows:
            bench.case("plain", (rows, WIDTH), plain_run, lambda whole: whole)
    if "fused" in options.sections and gpu:
        fused(bench, (WIDTH,), LONG_TOKENS)
    if "small" in options.sections:
        small(bench)
    if "programs" in options.sections:
        programs(bench)
    bench.write()
    dist.destroy_process_group()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="files, without their endings")
    parser.add_argument("--no-p2p", action="store_true", help="NCCL through host memory, as between hosts")
    parser.add_argument("--sections", nargs="+", default=["fused", "plain", "small"])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="of the section plain")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=100.0, help="after which no case begins")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds of a wait for another rank")
    parser.add_argument(
        "--case-seconds", type=float, default=30.0, help="after which a hung way ends the run"
    )
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
