"""A stream of requests of mixed lengths: continuous batching against fixed batches of the same requests.

    python benchmarks/request_stream.py --preset mamba-2.8b --requests 512 --out benchmarks/request_stream
    torchrun --standalone --nproc-per-node 2 benchmarks/request_stream.py --requests 512 --out ...

Prompts of 128 to `--longest` random tokens and answers of 16 to 512, both drawn log-uniformly; all requests
are there from the start. In fixed batches, the next `--sequences` of them start when the last of the batch
before has ended. A gap is the time between two tokens of one request. The stream runs once before it counts,
as on a server that has compiled its kernels and captured its steps.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from typing import Any

import reporting

from ssm_dist import LLM, SamplingParams
from ssm_dist.requests import Prompt


def requests(options: argparse.Namespace) -> tuple[list[Prompt], list[SamplingParams]]:
    """The stream, the same on every call."""
    draw = random.Random(7)

    def log_uniform(low: int, high: int) -> int:
        return round(math.exp(draw.uniform(math.log(low), math.log(high))))

    prompts = list[Prompt]()
    params = []
    for _ in range(options.requests):
        prompts.append(draw.choices(range(1, 500), k=log_uniform(128, options.longest)))
        new = log_uniform(16, options.longest_answer)
        params.append(SamplingParams(max_new_tokens=new, ignore_eos=True))
    return prompts, params


def timed(llm: LLM, prompts: list[Prompt], params: list[SamplingParams], batch: int) -> dict[str, float]:
    """Seconds, rates and gaps, `batch` requests handed over at a time."""
    first, gaps, begin = list[float](), list[float](), time.perf_counter()
    for start in range(0, len(prompts), batch):
        last: dict[int, float] = {}
        for event in llm.stream(prompts[start : start + batch], params[start : start + batch]):
            now = time.perf_counter()
            if event.index in last:
                gaps.append(now - last[event.index])
            else:
                first.append(now - begin)
            last[event.index] = now
    seconds = time.perf_counter() - begin
    prompt_tokens = sum(map(len, prompts))
    return {
        "seconds": round(seconds, 2),
        "requests/s": round(len(prompts) / seconds, 2),
        "new tokens/s": round((len(first) + len(gaps)) / seconds, 1),
        "tokens/s": round((prompt_tokens + len(first) + len(gaps)) / seconds, 1),
        "median s to first token": round(statistics.median(first), 2),
        "median gap, ms": round(statistics.median(gaps) * 1e3, 2),
        "99 % of gaps, ms": round(sorted(gaps)[len(gaps) * 99 // 100] * 1e3, 2),
    }


def main() -> reporting.Report:
    """Both ways, one after the other."""
    parser = reporting.parser(__doc__)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--longest", type=int, default=8192, help="tokens of a prompt")
    parser.add_argument("--longest-answer", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=8192, help="prompt tokens of a step")
    options, flags = parser.parse_known_args()
    cache = {"max_sequences": options.sequences, "max_tokens": options.sequences * 4096}
    config = reporting.configuration(
        options.preset, flags, cache=cache, prefill={"chunk_tokens": options.chunk}
    )
    report = reporting.Report(options.out, options.preset, config)
    llm = LLM(report.loaded, config)
    prompts, params = requests(options)
    rows: list[dict[str, Any]] = []
    some = len(prompts) // 4
    for name, batch in (("continuous", len(prompts)), ("fixed", options.sequences)):
        timed(llm, prompts[:some], params[:some], batch)  # captures the steps of most shapes
        rows.append({"batches": name, **timed(llm, prompts, params, batch)})
        report.add(f"{len(prompts)} requests, {options.sequences} at a time", rows)
    return report


if __name__ == "__main__":
    reporting.run(main)
