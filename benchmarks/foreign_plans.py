"""Time transformers' own classes, unsharded and sharded by our plans: prefill and decode, tokens/s.

    python benchmarks/foreign_plans.py --out benchmarks/foreign_plans --degrees 1 2 4
    python benchmarks/foreign_plans.py --out /tmp/tiny --degrees 1 2 --tiny     # on CPU ranks, in a minute

Every degree is one torchrun; degree 1 is the class as it is. Weights are random and bfloat16, built on meta
and allocated as shards; prefill is 8 prompts of 2048 tokens, decode one token of each, through the model's
forward and its cache. transformers takes its kernels from mamba-ssm and causal-conv1d where those are
installed, and else loops over the tokens in Python; the report says which.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MODELS = ["mamba-2.8b", "zamba-7b"]
COLUMNS = ["model", "degree", "prefill tokens/s", "decode tokens/s", "ms a decode step", "GiB a rank"]


def configuration(name: str, tiny: bool) -> Any:
    """transformers' configuration of the released sizes, or a tiny one of the same architecture."""
    from transformers import MambaConfig, ZambaConfig

    if name == "mamba-2.8b":
        sizes = (36, 3, 97) if tiny else (2560, 64, 50280)
        return MambaConfig(hidden_size=sizes[0], num_hidden_layers=sizes[1], vocab_size=sizes[2])
    if not tiny:
        return ZambaConfig()  # its defaults are zamba-7b-v1
    return ZambaConfig(
        hidden_size=40, num_hidden_layers=8, vocab_size=97, intermediate_size=52, num_attention_heads=4,
        num_key_value_heads=4, mamba_dt_rank=3,
    )  # fmt: skip


def build(name: str, tiny: bool, device: torch.device) -> nn.Module:
    """The model, or on several ranks this rank's shard of it, with random weights."""
    from transformers import AutoModelForCausalLM

    from ssm_dist.parallel import TensorParallel, shard_module

    with torch.device("meta"):
        config = configuration(name, tiny)
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if dist.get_world_size() > 1:
        shard_module(model, TensorParallel.over_all_ranks(device.type))
    model.to_empty(device=device)
    model.tie_weights()  # which to_empty undoes
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.copy_(torch.randn(tensor.shape, device=device) * 0.02)
    return model


@torch.inference_mode()
def seconds(step: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median time of a step over the ranks' slowest, after two that do not count."""
    times = []
    for index in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        elapsed = torch.tensor(time.perf_counter() - begin, device=device)
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
        if index >= 2:
            times.append(float(elapsed))
    return statistics.median(times)


@torch.inference_mode()
def cache_after(model: nn.Module, tokens: Tensor) -> dict[str, Any]:
    """The argument that hands a prompt's cache to the next forward; its name differs between classes."""
    output = model(tokens, use_cache=True, logits_to_keep=1)
    name = "cache_params" if getattr(output, "cache_params", None) is not None else "past_key_values"
    return {name: getattr(output, name)}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model at the degree of the running ranks."""
    degree, cuda = dist.get_world_size(), torch.cuda.is_available() and not options.tiny
    device = torch.device("cuda", dist.get_rank()) if cuda else torch.device("cpu")
    model = build(name, options.tiny, device)
    batch, length = (2, 16) if options.tiny else (8, 2048)
    tokens = torch.randint(1, 97, (batch, length), device=device)
    prefill = seconds(lambda: model(tokens, use_cache=True, logits_to_keep=1), device, options.repeats)
    cache, last = cache_after(model, tokens), tokens[:, -1:]
    decode = seconds(lambda: model(last, use_cache=True, **cache), device, 4 * options.repeats)
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {
        "model": name,
        "degree": degree,
        "prefill tokens/s": round(batch * length / prefill, 1),
        "decode tokens/s": round(batch / decode, 1),
        "ms a decode step": round(1e3 * decode, 2),
        "GiB a rank": round(held / 2**30, 3),
        "batch": batch,
        "prompt tokens": length,
    }


def worker(options: argparse.Namespace) -> None:
    """What one rank of a torchrun does; rank 0 prints a JSON document a model."""
    cuda = torch.cuda.is_available() and not options.tiny
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    for name in options.models:
        result = measure(name, options)
        if dist.get_rank() == 0:
            print("RESULT " + json.dumps(result), flush=True)
        if cuda:
            torch.cuda.empty_cache()
    dist.destroy_process_group()


def run(degree: int, arguments: list[str], timeout: float) -> list[dict[str, Any]]:
    """One torchrun; what it measured, or its error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(degree)]
    done = subprocess.run(
        [*command, __file__, "--worker", *arguments], capture_output=True, text=True, timeout=timeout
    )
    found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return found + ([{"degree": degree, "error": done.stderr[-2000:]}] if done.returncode else [])


def main() -> None:
    """Measure every degree, and write report.md and report.json into --out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/foreign_plans"))
    parser.add_argument("--degrees", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=560, help="for one torchrun")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on CPU ranks, to see that it runs")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    arguments = ["--models", *options.models, "--repeats", str(options.repeats)]
    arguments += ["--tiny"] if options.tiny else []
    results = [row for degree in options.degrees for row in run(degree, arguments, options.seconds)]
    write(options.out, results)


def write(folder: Path, results: list[dict[str, Any]]) -> None:
    """The report as Markdown and JSON; the JSON is printed, too."""
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    kernels = {name: importlib.util.find_spec(name) is not None for name in ("mamba_ssm", "causal_conv1d")}
    report = {
        "hardware": f"{torch.cuda.device_count()} x {gpu}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__} | kernels,
        "command": f"python benchmarks/foreign_plans.py {' '.join(sys.argv[1:])}",
        "runs": results,
    }
    lines = [f"{report['hardware']}, {report['versions']}", "", f"`{report['command']}`", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(str(row.get(key, "-")) for key in COLUMNS) + " |" for row in results]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text("\n".join(lines) + "\n")
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
