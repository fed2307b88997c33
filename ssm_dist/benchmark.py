"""Times a grid of cases on the engine as it is: prefill, decode and whole requests, beside their floors.

A case is B sequences of P random prompt tokens with G new tokens each. It runs twice a repeat: once for one
token a sequence, which is prefill alone, and once for all G. With T_1 and T_G the seconds of the two,

    prefill tokens/s = B P / T_1     ms a decode step = (T_G - T_1) / (G - 1)     output tokens/s = B G / T_G

The floor of a decode step is the time to read this rank's weights once and its states twice (in and out) at
the copy bandwidth measured at the start. Prefill does 2 FLOP a token for every weight (vectors, embedding and
head apart); a shared block counts once a call.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from ssm_dist.config import BenchmarkConfig
from ssm_dist.errors import UserError
from ssm_dist.llm import LLM
from ssm_dist.requests import Prompt
from ssm_dist.sampling.params import SamplingParams
from ssm_dist.state_cache import state_need
from ssm_dist.version import __version__

COPY_BYTES = 1 << 30


def run_benchmark(llm: LLM, grid: BenchmarkConfig) -> dict[str, Any]:
    """Measure every case of the grid; the same calls on every rank. Returns the report, a JSON document.

    A case that the cache cannot hold is reported with its reason, and the others proceed. Raises `UserError`
    when a batch is larger than [cache] max_sequences.
    """
    largest = max(grid.batches)
    if largest > llm.cache.max_sequences:
        raise UserError(
            f"[benchmark] batches has {largest}, but [cache] max_sequences is {llm.cache.max_sequences}"
        )
    bandwidth = copy_bandwidth(llm.loaded.device)
    cases = [(batch, prompt) for batch in grid.batches for prompt in grid.prompt_tokens]
    return {
        "environment": _environment(llm, bandwidth),
        "config": llm.config.model_dump(mode="json"),
        "cases": [_case(llm, grid, batch, prompt, bandwidth) for batch, prompt in cases],
    }


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy on this GPU; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).random_()
    target, times = torch.empty_like(source), []
    for _ in range(7):
        begin = _now(device)
        target.copy_(source)
        times.append(_now(device) - begin)
    return 2 * COPY_BYTES / statistics.median(times)


def _case(llm: LLM, grid: BenchmarkConfig, batch: int, prompt: int, bandwidth: float) -> dict[str, Any]:
    case: dict[str, Any] = {"batch": batch, "prompt_tokens": prompt, "new_tokens": grid.new_tokens}
    try:
        for _ in range(grid.warmup):
            _run(llm, batch, prompt, grid.new_tokens)
        pairs = [_run(llm, batch, prompt, n) for _ in range(grid.repeats) for n in (1, grid.new_tokens)]
    except UserError as error:
        return case | {"error": str(error)}
    first, whole = pairs[::2], pairs[1::2]
    return case | _measures(llm, case, first, whole, bandwidth)


def _run(llm: LLM, batch: int, prompt: int, new_tokens: int) -> float:
    """Seconds from the prompts' arrival to the last token of the last sequence."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = llm.loaded.config.vocab_size
    prompts: list[Prompt] = [
        torch.randint(vocab_size, (prompt,), generator=generator).tolist() for _ in range(batch)
    ]
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    if dist.is_initialized():
        dist.barrier()
    begin = _now(llm.loaded.device)
    llm.generate(prompts, params)
    return _now(llm.loaded.device) - begin


def _measures(
    llm: LLM, case: dict[str, Any], first: list[float], whole: list[float], bandwidth: float
) -> dict[str, Any]:
    batch, prompt, new = case["batch"], case["prompt_tokens"], case["new_tokens"]
    steps = [(g - one) / (new - 1) for one, g in zip(first, whole, strict=True)]
    step, prefill, total = (statistics.median(times) for times in (steps, first, whole))
    moved = llm.weight_bytes + 2 * batch * _state_bytes(llm)
    flop = flop_a_token(llm) * batch * prompt
    return {
        "prefill_seconds": spread(first),
        "request_seconds": spread(whole),
        "prefill_tokens_per_second": round(batch * prompt / prefill, 1),
        "decode_ms_a_step": round(1e3 * step, 3),
        "output_tokens_per_second": round(batch * new / total, 1),
        "decode_gb_per_second": round(moved / step / 1e9, 1),
        "decode_floor_ms": round(1e3 * moved / bandwidth, 3) if bandwidth else None,
        "prefill_tflop_per_second_a_rank": round(flop / prefill / llm.config.parallel.tensor / 1e12, 2),
        "peak_memory_bytes": _peak_memory(llm.loaded.device),
    }


def flop_a_token(llm: LLM) -> int:
    """Floating-point operations of the projections for one prompt token, over all ranks."""
    sites = llm.model.state_shapes().attention_sites
    total = 0
    for placement in llm.loaded.plan.parameters:
        owner = placement.path.split(".")[0]
        if len(placement.shape) > 1 and owner not in ("embedding", "head"):
            total += 2 * math.prod(placement.shape) * (sites if owner == "shared" else 1)
    return total


def _state_bytes(llm: LLM) -> int:
    """Of one sequence on one rank."""
    loaded = llm.loaded
    return state_need(llm.model.state_shapes(), 1, 0, loaded.dtype, loaded.state_dtype).slots


def spread(seconds: list[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {
        "min": round(min(seconds), 5),
        "median": round(statistics.median(seconds), 5),
        "max": round(max(seconds), 5),
    }


def _environment(llm: LLM, bandwidth: float) -> dict[str, Any]:
    device = llm.loaded.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"
    return {
        "ssm_dist": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": f"{llm.config.parallel.tensor} x {name}",
        "copy_gb_per_second": round(bandwidth / 1e9, 1),
        "dtype": str(llm.loaded.dtype).removeprefix("torch."),
        "kernels": llm.loaded.kernels,
        "reductions": llm.reduction,
        "weight_bytes_a_rank": llm.weight_bytes,
        "state_bytes_a_sequence_and_rank": _state_bytes(llm),
    }


def _peak_memory(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _now(device: torch.device) -> float:
    """The clock, after all work queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    columns = {
        "batch": "batch", "prompt": "prompt_tokens", "new": "new_tokens",
        "prefill tokens/s": "prefill_tokens_per_second", "TFLOP/s a rank": "prefill_tflop_per_second_a_rank",
        "ms a decode step": "decode_ms_a_step", "floor ms": "decode_floor_ms", "GB/s": "decode_gb_per_second",
        "output tokens/s": "output_tokens_per_second",
    }  # fmt: skip
    lines = [f"- {key}: {value}" for key, value in report["environment"].items()]
    lines += ["", "| " + " | ".join(columns) + " |", "|" + "---:|" * len(columns)]
    for case in report["cases"]:
        cells = [str(case.get(key, case.get("error", "-"))) for key in columns.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
