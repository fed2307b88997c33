"""What the peers' scripts share: the same cases, timed the same way, in documents for `ssm-dist report`.

A peer runs a batch in step, so a decode step is (T_G - T_1) / (G - 1), with T_1 and T_G the seconds of its
own generation of one token and of all. In a case of one new token, its prefill is the faster of that and of
its plain forward. The document is rewritten after every case; one that fails, or takes too long, leaves its
reason.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssm_dist.benchmark.cases import Case, parse_case
from ssm_dist.benchmark.timing import spread
from ssm_dist.provenance import command
from ssm_dist.registry import preset


@dataclass
class Peer:
    """One model as a peer runs it, on one GPU."""

    model: str
    generate: Callable[[Tensor, int], Any]
    """Token ids (B, P), and how many new ones."""
    forwards: dict[str, Callable[[Tensor], Any]] = field(default_factory=dict)
    """Ways to read prompts besides, by name, for the logits after them; timed in cases of one new token."""


def parser(about: str | None) -> argparse.ArgumentParser:
    """The options of a peer's script."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="the document, a JSON file")
    made.add_argument("--cases", nargs="+", help="BxP+G, as in [benchmark] cases; by default a handful")
    made.add_argument("--repeats", type=int, default=2)
    made.add_argument("--case-seconds", type=int, default=25, help="for one case, its warm-up included")
    return made


def new_document(system: str, version: str, **libraries: str) -> dict[str, Any]:
    """A document without cases."""
    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else f"CPU, {platform.machine()}"
    return {
        "system": system,
        "version": version,
        "date": datetime.date.today().isoformat(),
        "command": command(f"benchmarks/peers/{Path(sys.argv[0]).name}", sys.argv[1:]),
        "environment": {"hardware": f"1 x {name}", "torch": torch.__version__, **libraries},
        "cases": [],
    }


def measure(peer: Peer, document: dict[str, Any], options: argparse.Namespace, cases: list[str]) -> None:
    """Time the cases one after the other, and write the document after each."""
    for written in options.cases or cases:
        case = parse_case(written)
        row: dict[str, Any] = {"model": peer.model, "degree": 1, **asdict(case)}
        try:
            with limited(options.case_seconds):
                row |= timed(peer, case, options.repeats)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        document["cases"].append(row)
        write(document, options.out)
        print(peer.model, case, {key: row[key] for key in row if key in SHOWN}, flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


SHOWN = ("error", "prefill_tokens_per_second", "decode_ms_a_step", "output_tokens_per_second", "prefill_path")


def write(document: dict[str, Any], out: Path) -> None:
    """The document as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")


@torch.inference_mode()
def timed(peer: Peer, case: Case, repeats: int) -> dict[str, Any]:
    """The measures of one case, under the names that ours have."""
    vocab_size = preset(peer.model)[1].vocab_size
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.tensor(case.prompts(vocab_size), device=device)
    ways: dict[str, Callable[[], Any]] = {"generate": lambda: peer.generate(ids, 1)}
    if case.new_tokens == 1:
        ways |= {name: partial(run, ids) for name, run in peer.forwards.items()}
    else:
        peer.generate(ids, case.new_tokens)
    reading = {name: seconds(run, repeats, warmup=int(case.new_tokens == 1)) for name, run in ways.items()}
    path = min(reading, key=lambda name: statistics.median(reading[name]))
    prefill = statistics.median(reading[path])
    measures: dict[str, Any] = {
        "prefill_seconds": spread(reading[path]),
        "prefill_tokens_per_second": round(case.batch * case.prompt_tokens / prefill, 1),
        "prefill_path": path,
    }
    if case.new_tokens > 1:
        whole = seconds(lambda: peer.generate(ids, case.new_tokens), repeats, warmup=0)
        first, total = statistics.median(reading["generate"]), statistics.median(whole)
        step = (total - first) / (case.new_tokens - 1)
        measures |= {
            "request_seconds": spread(whole),
            "output_tokens_per_second": round(case.batch * case.new_tokens / total, 1),
            "decode_ms_a_step": round(1e3 * step, 4),
            "decode_tokens_per_second": round(case.batch / step, 1),
        }
    return measures


def seconds(run: Callable[[], Any], repeats: int, warmup: int) -> list[float]:
    """Of every repeat, to the end of the work on the device."""
    times = []
    for index in range(warmup + repeats):
        begin = now()
        run()
        if index >= warmup:
            times.append(now() - begin)
    return times


def now() -> float:
    """The clock, after all work queued on the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def limited(limit: int) -> Iterator[None]:
    """Raises TimeoutError in the body after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {limit} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
