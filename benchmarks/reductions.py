"""Latency of every path and codec of the reductions, against NCCL in the same run, inside CUDA graphs.

    torchrun --standalone --nproc-per-node 2 benchmarks/reductions.py --out reductions.json
    NCCL_P2P_DISABLE=1 torchrun ... benchmarks/reductions.py --process-group-only --out without_p2p.json

Each case captures several calls in a graph and replays it; a time is the median of the repeats, of the
slowest rank. Beside it: the relative L2 error against the float32 sum, and whether all ranks hold the same
bits. The last line is one JSON document, which is also rewritten to --out after every case. A case that fails
is recorded with its error; one that hangs ends the run after --case-seconds, and what was measured stays. On
a CPU it tries the program, at tiny sizes.
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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssm_dist.kernels import add_rms_norm, backend
from ssm_dist.parallel import TensorParallel
from ssm_dist.parallel.collectives import (
    Reductions,
    carrier,
    tp_all_reduce,
    tp_all_reduce_add_rms_norm,
    tp_all_reduce_add_rms_norm_split,
    wait_for_device,
)
from ssm_dist.version import __version__

Run = Callable[[Tensor], Any]

WIDTH = 2560
ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 104858)
"""5 KB to 512 MB in rows of 2560 bfloat16."""
TOKENS, WIDTHS = (1, 8, 64, 256), (2560, 4096)
LONG_TOKENS = (4096, 16384, 65536)
SMALL_WIDTHS, SMALL_ROWS = (192, 264, 288), (1, 8, 64, 2048)
WAYS = {
    "all_reduce": ("none", 128, "all_reduce"),
    "one_shot": ("none", 128, "one_shot"),
    "two_shot": ("none", 128, "two_shot"),
    "bulk": ("none", 128, "bulk"),
    "bulk int8/128": ("int8", 128, "bulk"),
    "bulk int8/32": ("int8", 32, "bulk"),
    "bulk fp8/128": ("fp8", 128, "bulk"),
    "bulk int4/32": ("int4", 32, "bulk"),
    "exchange int8/128": ("int8", 128, "exchange"),
    "exchange fp8/128": ("fp8", 128, "exchange"),
    "exchange int4/32": ("int4", 32, "exchange"),
    "auto": ("none", 128, "auto"),
    "auto int8/128": ("int8", 128, "auto"),
}
"""Codec, group size, algorithm."""
PUSHED_BYTES = 6e6
"""Beyond them, one_shot and two_shot are not measured."""


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

    @property
    def speaks(self) -> bool:
        return self.tp.rank == 0

    def ways(self, size: float) -> list[str]:
        """What can serve messages of so many bytes here."""
        shared = "shared" in carrier(self.tp.group) and not self.broken
        kept = []
        for name, (_, _, algorithm) in WAYS.items():
            if algorithm in ("one_shot", "two_shot", "bulk") and not shared:
                continue
            if algorithm in ("one_shot", "two_shot") and size > PUSHED_BYTES:
                continue
            kept.append(name)
        return kept

    def case(
        self, section: str, shape: tuple[int, int], runs: dict[str, Run], exact: Callable[..., Tensor]
    ) -> None:
        """Measure every way of one sum of `shape`; what `exact` makes of the float32 sum is the truth."""
        x = torch.randn(*shape, device=self.device, dtype=torch.bfloat16)
        row: dict[str, Any] = {"section": section, "rows": shape[0], "width": shape[1], "bytes": x.nbytes}
        whole = x.float()
        dist.all_reduce(whole)
        truth = exact(whole)
        del whole
        for name, run in runs.items():
            if self.broken and WAYS[name][2] not in ("all_reduce", "exchange"):
                continue
            faulthandler.dump_traceback_later(self.options.case_seconds, exit=True)
            try:
                row[name] = self.measured(run, x, truth)
            except Exception as error:
                row[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
                if WAYS[name][2] not in ("all_reduce", "exchange"):
                    self.broken = f"{section} {shape} {name}"
            finally:
                faulthandler.cancel_dump_traceback_later()
        self.rows.append(row)
        self.write(row)

    def measured(self, run: Run, x: Tensor, truth: Tensor) -> dict[str, Any]:
        """Microseconds, error, and whether the bits agree."""
        got = run(x)
        wait_for_device(self.tp.group, self.device)
        if not isinstance(got, Tensor):
            got = got[0]
        error = float((got.float() - truth).norm() / truth.norm())
        same = self.same_on_all_ranks(got)
        del got
        us = torch.tensor(1e6 * self.seconds(lambda: run(x), x.nbytes), device=self.device)
        dist.all_reduce(us, op=dist.ReduceOp.MAX)
        return {"us": round(float(us), 2), "error": error, "same": same}

    def same_on_all_ranks(self, x: Tensor) -> bool:
        """Whether all ranks hold the same bits, by two sums of them."""
        bits = x.contiguous().view(torch.int16).flatten().long()
        place = torch.arange(len(bits), device=x.device) % 9973 + 1
        mine = torch.stack([bits.sum(), (bits * place).sum()])
        sums = [torch.empty_like(mine) for _ in range(self.tp.degree)]
        dist.all_gather(sums, mine)
        return all(torch.equal(mine, other) for other in sums)

    def seconds(self, call: Callable[[], Any], size: int) -> float:
        """Of one call: the median of the repeats of a graph of several, or of plain calls on a CPU."""
        calls = max(2, min(20, int(64e6 / size)))
        if self.device.type == "cpu":
            begin = time.perf_counter()
            for _ in range(2):
                call()
            return (time.perf_counter() - begin) / 2
        for _ in range(2):
            call()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(calls):
                call()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        times = []
        for repeat in range(self.options.repeats + 2):
            dist.barrier()
            events[0].record()
            graph.replay()
            events[1].record()
            wait_for_device(self.tp.group, self.device)
            if repeat >= 2:
                times.append(events[0].elapsed_time(events[1]) / 1e3 / calls)
        return statistics.median(times)

    def write(self, row: dict[str, Any]) -> None:
        """Print a case, and rewrite the document."""
        if not self.speaks:
            return
        base = row.get("all_reduce", {}).get("us")
        parts = []
        for name in WAYS:
            found = row.get(name)
            if found is None:
                continue
            if "us" not in found:
                parts.append(f"{name} FAILED {found['error'][:90]}")
                continue
            ratio = f" x{base / found['us']:.2f}" if base and name != "all_reduce" else ""
            bits = "" if found["same"] else " DIFFERENT BITS"
            parts.append(f"{name} {found['us']:.1f}{ratio} ({found['error']:.4f}){bits}")
        print(f"{row['section']:6} {row['rows']:6} x {row['width']:4}: " + " | ".join(parts), flush=True)
        document = self.document()
        if self.options.out is not None:
            self.options.out.parent.mkdir(parents=True, exist_ok=True)
            self.options.out.write_text(document + "\n")

    def document(self) -> str:
        return json.dumps(self.report | {"broken": self.broken, "rows": self.rows})


def plain(bench: Bench, shape: tuple[int, int], section: str) -> None:
    """Sums by themselves."""

    def way(codec: str, group_size: int, algorithm: str) -> Run:
        return lambda x: tp_all_reduce(x, bench.tp.group, codec, group_size, algorithm)

    names = bench.ways(2.0 * shape[0] * shape[1])
    bench.case(section, shape, {name: way(*WAYS[name]) for name in names}, lambda whole: whole)


def fused(bench: Bench, shape: tuple[int, int]) -> None:
    """Sums with residual and norm; for long messages, the residual split between ranks."""
    rows, width = shape
    generator = torch.Generator(device=bench.device).manual_seed(5)
    residual = torch.randn(rows, width, device=bench.device, generator=generator)
    weight = torch.ones(width, device=bench.device, dtype=torch.bfloat16)
    stripe = -(-rows // bench.tp.degree)
    own = residual[bench.tp.rank * stripe :][:stripe].contiguous()
    own = torch.nn.functional.pad(own, (0, 0, 0, stripe - len(own)))

    def way(codec: str, group_size: int, algorithm: str) -> Run:
        args = (weight, 1e-5, bench.tp.group)
        if algorithm == "bulk":
            return lambda x: tp_all_reduce_add_rms_norm_split(
                x, own, *args, bench.tp.degree, codec, group_size, algorithm
            )
        return lambda x: tp_all_reduce_add_rms_norm(x, residual, *args, codec, group_size, algorithm)

    names = [name for name in bench.ways(2.0 * rows * width) if not name.startswith("exchange")]
    bench.case(
        "fused", shape, {name: way(*WAYS[name]) for name in names},
        lambda whole: add_rms_norm(whole, residual, weight, 1e-5)[0].float(),
    )  # fmt: skip


def main() -> None:
    """Run all sections that were asked for."""
    options = _options()
    gpu = torch.cuda.is_available() and not options.cpu
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    backend.select("auto", device)
    torch.manual_seed(dist.get_rank())
    tp = TensorParallel.over_all_ranks(device.type, Reductions(timeout_seconds=options.timeout))
    if gpu and not options.process_group_only:
        longest = max(options.rows) if "plain" in options.sections else max(LONG_TOKENS)
        tp.share_memory(min(longest, 65536), max(WIDTHS), torch.bfloat16, device)
    report = {
        "ranks": tp.degree, "carrier": carrier(tp.group), "ssm_dist": __version__, "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if gpu else "CPU",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpu else "",
        "p2p_disabled": os.environ.get("NCCL_P2P_DISABLE", "0"),
    }  # fmt: skip
    bench = Bench(tp, device, options, report)
    if bench.speaks:
        print(json.dumps(report), flush=True)
    if "small" in options.sections:
        for width in SMALL_WIDTHS:
            for rows in SMALL_ROWS:
                plain(bench, (rows, width), "small")
    if "fused" in options.sections:
        for width in WIDTHS:
            for tokens in TOKENS:
                fused(bench, (tokens, width))
        for tokens in LONG_TOKENS if gpu else ():
            fused(bench, (tokens, WIDTH))
    if "plain" in options.sections:
        for rows in options.rows:
            plain(bench, (rows, WIDTH), "plain")
    if bench.speaks:
        print(bench.document())
    dist.destroy_process_group()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sections", nargs="+", default=["small", "fused", "plain"])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="of the section plain")
    parser.add_argument("--process-group-only", action="store_true", help="no memory shared by GPUs")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds of a wait for another rank")
    parser.add_argument(
        "--case-seconds", type=float, default=60.0, help="after which a hung case ends the run"
    )
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
