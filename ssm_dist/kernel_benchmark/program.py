"""Times every op at the shapes of the released models, against its floor, the definition and its peers.

    ssm-dist kernels [--models mamba-2.8b ...] [--degrees 1 2 4] [--ops causal_conv ...]
        [--sweep] [--seconds 60] [--out file.json]

The floor of a case is the largest of three times: its bytes at the bandwidth of a large copy, its operations
at the rate of a large matrix product, its special functions at 16 a clock a multiprocessor; the first two
rates are measured at the start. Bytes/s are also given as a part of what the memory's clock and width allow.
Each timing replays a CUDA graph of calls on several sets of arguments, together larger than the L2 cache
several times over; the median of its repeats counts. The last line is one JSON document. On a CPU, only the
definitions are timed, to try the program.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import itertools
import json
import logging
import math
import operator
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ssm_dist import kernels
from ssm_dist.errors import UserError
from ssm_dist.kernel_benchmark.cases import Case, cases
from ssm_dist.kernel_benchmark.clock import Call, Clock
from ssm_dist.kernel_benchmark.page import markdown
from ssm_dist.kernel_benchmark.peers import installed_peers
from ssm_dist.kernel_benchmark.precompile import precompile
from ssm_dist.kernels import backend, tuning
from ssm_dist.places import check_file
from ssm_dist.provenance import command, commit
from ssm_dist.version import __version__

logger = logging.getLogger(__name__)

MOST_COPIES = 400
REFERENCE_NUMBERS = 2048 * 5120
"""Tokens * channels beyond which the definitions are not timed: they would take most of the run."""

SWEEP: dict[str, list[tuning.Configuration]] = {
    "causal_conv": [
        {"BLOCK_T": t, "TILE": tile, "BLOCK_D": d, "num_warps": w}
        for d, w, rows in (
            (128, 1, ((8, 4), (8, 8), (16, 4), (16, 8), (16, 16), (32, 8), (64, 8))),
            (256, 1, ((8, 8), (16, 8), (32, 4), (32, 8), (64, 8))),
            (256, 2, ((16, 8),)),
            (512, 2, ((32, 8),)),
        )
        for t, tile in rows
    ],
    "causal_conv_update": [
        {"SEQUENCES": s, "BLOCK_D": d, "num_warps": w}
        for s, d, w in itertools.product((1, 2, 4), (128, 256, 512), (1, 2))
    ],
    "selective_state_update": [
        {"SEQUENCES": s, "BLOCK_D": d, "num_warps": w}
        for s, (d, w) in itertools.product((1, 2, 4), ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4), (128, 4)))
    ],
    "add_rms_norm": [{"num_warps": w, "EARLY": early} for w in (2, 4, 8, 16) for early in (0, 1)],
    "largest": [
        {"BLOCK": b, "num_warps": w} for b, w in itertools.product((512, 1024, 2048, 4096, 8192), (4, 8))
    ],
    "paged_attention": [
        {"BLOCK_M": m, "BLOCK_N": n, "num_warps": m // 8, "num_stages": stages}
        for m, n, stages in ((64, 32, 3), (64, 32, 2), (64, 64, 1), (64, 16, 3), (32, 32, 2))
    ],
}  # fmt: skip


def measure(
    case: Case, clock: Clock, ceilings: dict[str, float], nominal: float | None, peers: dict[str, Any]
) -> dict[str, Any]:
    """One row of the report; times in microseconds. `nominal`: the memory's bytes/s on paper."""
    sets = _argument_sets(case, clock)
    ours = clock.seconds([functools.partial(case.run, a) for a in sets])
    row: dict[str, Any] = {**_shape(case), "us": 1e6 * ours, "gb_s": case.bytes / ours / 1e9}
    if ceilings:
        floor = max(getattr(case, unit) / rate for unit, rate in ceilings.items())
        row |= {"floor_us": 1e6 * floor, "of_floor": floor / ours}
    if nominal is not None:
        row["of_nominal"] = case.bytes / ours / nominal
    if case.sequences * case.tokens * case.width <= REFERENCE_NUMBERS:
        with backend.using("reference"):
            row["reference_us"] = 1e6 * clock.eagerly(lambda: case.run(sets[0]))
    times = {}
    for name, peer in peers.get(case.op, {}).items():
        try:
            times[name] = 1e6 * clock.seconds([peer(*a) for a in sets])
        except Exception as error:
            logger.info("%s cannot run %s: %s", name, case.op, error)
    if times:
        row["peer"] = min(times, key=times.__getitem__)
        row["peer_us"], row["speedup"] = times[row["peer"]], times[row["peer"]] / row["us"]
    logger.info(" ".join(str(round(v, 2)) if isinstance(v, float) else str(v) for v in row.values()))
    return row


def _shape(case: Case) -> dict[str, Any]:
    return {name: getattr(case, name) for name in CASE_COLUMNS}


def _argument_sets(case: Case, clock: Clock) -> list[list[Any]]:
    """So many that a pass over them finds nothing of the last one in the cache."""
    copies = max(1, min(MOST_COPIES, round(4 * clock.cache_bytes / case.bytes)))
    return [case.make(clock.device) for _ in range(copies)]


def sweep(case: Case, clock: Clock) -> dict[str, Any]:
    """Microseconds of the recorded configuration and of all candidates, the fastest first."""
    calls: list[Call] = [functools.partial(case.run, a) for a in _argument_sets(case, clock)]
    recorded, found = 1e6 * clock.seconds(calls), []
    for config in SWEEP[case.op]:
        with tuning.forced(case.op, config):
            found.append((1e6 * clock.seconds(calls), config))
    found.sort(key=operator.itemgetter(0))
    logger.info("%s recorded %.1f best %.1f %s", _shape(case), recorded, *found[0])
    return {**_shape(case), "recorded_us": recorded, "candidates": found}


def compiled_kernels() -> list[dict[str, Any]]:
    """Registers and spills of everything that Triton compiled in this process."""
    found = []
    for module in [m for name, m in sys.modules.items() if name.startswith("ssm_dist.kernels.")]:
        for function in vars(module).values():
            for cache in getattr(function, "device_caches", {}).values():
                found += [
                    {"kernel": k.name, "warps": k.metadata.num_warps, "registers": k.n_regs,
                     "spills": k.n_spills}
                    for k in cache[0].values()
                ]  # fmt: skip
    return found


def environment(device: torch.device) -> dict[str, str]:
    """What a report has to say of the machine and the libraries."""
    versions = {"ssm_dist": __version__, "commit": str(commit())}
    versions |= {"torch": torch.__version__, "python": platform.python_version()}
    for package in ("triton", "mamba_ssm", "causal_conv1d"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU", **versions}


def table(rows: list[dict[str, Any]], title: str, columns: dict[str, str]) -> Table:
    """`columns`: key of a row -> format of its value; a missing value is a dash."""
    result = Table(title=title, title_justify="left", box=SIMPLE)
    for name in columns:
        result.add_column(name.replace("_", " "), justify="left" if columns[name] == "" else "right")
    for row in rows:
        result.add_row(*(format(row[key], form) if key in row else "-" for key, form in columns.items()))
    return result


CASE_COLUMNS = {"op": "", "model": "", "degree": "d", "sequences": "d", "tokens": "d", "width": "d"}
COLUMNS = CASE_COLUMNS | {
    "us": ".1f", "floor_us": ".1f", "of_floor": ".0%", "gb_s": ".0f", "of_nominal": ".0%",
    "reference_us": ".0f", "peer_us": ".1f", "speedup": ".2f", "peer": "",
}  # fmt: skip

SWEEP_COLUMNS = CASE_COLUMNS | {"recorded_us": ".1f", "best_us": ".1f", "best": ""}


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line asks for; raises `UserError` for what cannot run."""
    options = _parser().parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if options.out is not None:
        check_file(options.out, "--out")
    deadline = time.monotonic() + options.seconds
    wanted = _wanted(options)
    if torch.cuda.device_count():
        precompile(wanted)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = backend.select("triton" if device.type == "cuda" else "reference", device)
    clock = Clock(device)
    ceilings = clock.ceilings()
    console = Console(width=None if sys.stdout.isatty() else 180)
    report: dict[str, Any] = {
        "environment": environment(device), "backend": chosen, "ceilings": ceilings,
        "command": command("ssm-dist kernels", sys.argv[1:] if words is None else words),
    }  # fmt: skip
    if options.sweep:
        report["sweep"] = [sweep(c, clock) for c in wanted]
        rows = [_best(row) for row in report["sweep"]]
        console.print(table(rows, "Sweep", SWEEP_COLUMNS))
    else:
        peers = installed_peers() if device.type == "cuda" else {}
        report["nominal_bytes"] = nominal = clock.nominal_rate()
        report["rows"] = [
            measure(c, clock, ceilings, nominal, peers) for c in wanted if time.monotonic() < deadline
        ]
        console.print(table(report["rows"], f"Kernels, backend {chosen}", COLUMNS))
    report["kernels"] = compiled_kernels()
    document = json.dumps(report)
    if options.out is not None:
        options.out.write_text(document + "\n")
        if not options.sweep:
            options.out.with_suffix(".md").write_text(markdown(report))
    print(document)


def _wanted(options: argparse.Namespace) -> list[Case]:
    """The cases that the options name. Raises `UserError` when there are none."""
    if min(options.degrees) < 1:
        raise UserError(f"--degrees: {min(options.degrees)} is no degree; the smallest is 1")
    known = list(cases(options.models, options.degrees))
    if not known:
        numbers, models = " or ".join(map(str, options.degrees)), ", ".join(options.models)
        raise UserError(f"--degrees: {numbers} divides d_inner of none of the models ({models})")
    wanted = [c for c in known if not options.ops or c.op in options.ops]
    if options.sweep:
        wanted = [c for c in wanted if _tunable(c)]
    if not wanted:
        what = "with configurations to sweep " if options.sweep else ""
        raise UserError(f"--ops: none of the models has a case {what}of {', '.join(options.ops)}")
    return wanted


def _tunable(case: Case) -> bool:
    return case.op in SWEEP and (case.op != "paged_attention" or case.tokens > 1)


def _best(row: dict[str, Any]) -> dict[str, Any]:
    best_us, config = row["candidates"][0]
    return {**row, "best_us": best_us, "best": " ".join(f"{k}={v}" for k, v in config.items())}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ssm-dist kernels", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--models", nargs="+", default=["mamba-2.8b", "falcon-mamba-7b", "zamba-7b"])
    parser.add_argument("--degrees", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--ops", nargs="+", default=[], choices=kernels.__all__, help="only these")
    parser.add_argument("--sweep", action="store_true", help="time all candidate configurations instead")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after so many")
    parser.add_argument("--out", type=Path, help="write the JSON document here too, and a page beside it")
    return parser
