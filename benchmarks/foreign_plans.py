"""Time other people's classes, unsharded and sharded by our plans: prefill and decode, tokens/s.

    python benchmarks/foreign_plans.py --out benchmarks/foreign_plans --degrees 1 2 4
    python benchmarks/foreign_plans.py --out /tmp/tiny --degrees 1 2 --tiny     # on CPU ranks, in a minute

Degree 1 is one process with the class as it is; every other degree is as many ranks, sharded by the class's
ready plan. The models of a degree share its processes. Runs of an earlier call stay in the report unless they
are repeated.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from joined_report import circumstances, join

MODELS = ["mamba-2.8b", "zamba-7b", "mamba-ssm-2.8b"]
INSTALLED = [name for name in MODELS if "mamba-ssm" not in name or importlib.util.find_spec("mamba_ssm")]
COLUMNS = {
    "model": "case", "degree": "degree", "CUDA kernels of": "packages", "prefill tokens/s": "prefill_rate",
    "prefill s": "prefill_seconds", "repeats": "prefill_repeats", "decode tokens/s": "decode_rate",
    "ms a decode step": "decode_ms", "GiB a rank": "gib",
}  # fmt: skip
INTRODUCTION = """# Other people's classes under our plans

mamba-2.8b and zamba-7b are transformers' classes, mamba-ssm-2.8b is mamba-ssm's MambaLMHeadModel, each with
its own forward; weights are random, in bfloat16. Degree 1 is the class as it is, in one process; above that
it is sharded by its ready plan, over NCCL, and the time is that of the slowest rank. Prefill is one forward
over 8 prompts of 2048 tokens that fills the cache and keeps the last logits: the median of the repeats that
fit into 10 seconds, at least one, after a short prompt that does not count. Decode is one forward over one
token of each of the 8, without sampling and without CUDA graphs: the median of 16 after two that do not
count.

transformers takes its scan from mamba-ssm and its convolution from causal-conv1d where those packages are
installed, and otherwise loops over the tokens in Python: such a prefill measures the host, not the GPUs, and
more ranks cannot speed it up, except that they share out Zamba's heads, each of which has its own loop.
Made by `benchmarks/foreign_plans.py`."""
WARM_UP = 2


def timed(step: Callable[[], Any], device: Any, repeats: int, budget: float) -> tuple[list[float], Any]:
    """Seconds of each repeat, of the slowest rank, until `budget` seconds are spent; and the last result."""
    import torch
    import torch.distributed as dist

    times: list[float] = []
    result = None
    while len(times) < repeats and sum(times) < budget:
        _synchronize(device)
        begin = time.perf_counter()
        result = step()
        _synchronize(device)
        elapsed = torch.tensor(time.perf_counter() - begin, device=device)
        if dist.is_initialized():
            dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
        times.append(float(elapsed))
    return times, result


def _synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(name: str, degree: int, device: Any, options: argparse.Namespace) -> dict[str, Any]:
    """One model at one degree; every rank of it calls this alike."""
    import torch
    from foreign_models import SUBJECTS, loaded, packages

    subject = SUBJECTS[name]
    batch, length = (2, 16) if options.tiny else (8, 2048)
    with torch.inference_mode():
        model = loaded(subject, options.tiny, degree, device)
        tokens = torch.randint(1, 97, (batch, length), device=device)
        subject.prefill(model, tokens[:, :16])
        times, cache = timed(
            lambda: subject.prefill(model, tokens), device, options.repeats, options.prefill_seconds
        )
        token = tokens[:, -1:].contiguous()
        steps, _ = timed(
            lambda: subject.decode(model, token, cache),
            device,
            WARM_UP + options.steps,
            options.prefill_seconds,
        )
    prefill, decode = statistics.median(times), statistics.median(steps[WARM_UP:] or steps)
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {
        "packages": packages(),
        "prefill_rate": round(batch * length / prefill, 1),
        "prefill_seconds": round(prefill, 3),
        "prefill_repeats": len(times),
        "decode_rate": round(batch / decode, 1),
        "decode_ms": round(1e3 * decode, 2),
        "decode_steps": len(steps) - WARM_UP,
        "gib": round(held / 2**30, 3),
        "batch": batch,
        "prompt_tokens": length,
    }


def worker(options: argparse.Namespace) -> None:
    """What one rank does; rank 0 prints a JSON document for each model."""
    import torch
    import torch.distributed as dist

    rank, degree = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = torch.cuda.is_available() and not options.tiny
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if degree > 1:
        dist.init_process_group(
            "nccl" if cuda else "gloo", init_method=options.meet.as_uri(), rank=rank, world_size=degree,
            device_id=device if cuda else None,
        )  # fmt: skip
    for name in options.models:
        try:
            found = measure(name, degree, device, options)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
        if rank == 0:
            print("RESULT " + json.dumps({"case": name, "degree": degree} | found), flush=True)
        if cuda:
            torch.cuda.empty_cache()
    sys.stdout.flush()
    os._exit(0)  # without the teardown of communicators


def run(degree: int, options: argparse.Namespace, seconds: float) -> list[dict[str, Any]]:
    """All models at one degree, in processes of their own; what was measured, and what was not and why."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "errors").open("w+") as errors:
        arguments = [*sys.argv[1:], "--meet", str(Path(folder) / "meet")]
        ranks = [_start(rank, degree, arguments, errors) for rank in range(degree)]
        try:
            output, _ = ranks[0].communicate(timeout=seconds)
            reason = f"rank 0 ended with exit code {ranks[0].returncode}"
        except subprocess.TimeoutExpired:
            ranks[0].kill()
            output, _ = ranks[0].communicate()
            reason = f"over {seconds} s"
        for process in ranks[1:]:
            process.kill()
            process.wait()
        errors.seek(0)
        said = errors.read()[-2000:]
    found = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("RESULT ")]
    missing = options.models[len(found) :]
    return found + [{"case": name, "degree": degree, "error": f"{reason}\n{said}"} for name in missing]


def _start(rank: int, degree: int, arguments: list[str], errors: TextIO) -> subprocess.Popen[str]:
    """A rank, without torchrun: its own process would import torch, too."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": degree, "LOCAL_WORLD_SIZE": degree}
    return subprocess.Popen(
        [sys.executable, __file__, *arguments],
        env=os.environ | {key: str(value) for key, value in own.items()},
        stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
        stderr=errors,
        text=True,
    )


def main() -> None:
    """Measure every degree; after each, --out has it in report.md and report.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/foreign_plans"))
    parser.add_argument("--degrees", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=INSTALLED)
    parser.add_argument("--repeats", type=int, default=3, help="of the prefill, at most")
    parser.add_argument("--steps", type=int, default=16, help="of decode")
    parser.add_argument("--prefill-seconds", type=float, default=10, help="no more repeats after these")
    parser.add_argument("--seconds", type=float, default=300, help="for all the models of a degree")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on CPU ranks, to see that it runs")
    parser.add_argument("--meet", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.meet is not None:
        worker(options)
    around = circumstances(["torch", "transformers", "mamba-ssm", "causal-conv1d"])
    for degree in options.degrees:
        for result in run(degree, options, options.seconds):
            print(json.dumps(result)[:600], flush=True)
            join(options.out, result | around, COLUMNS, INTRODUCTION)


if __name__ == "__main__":
    main()
