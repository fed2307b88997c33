"""A stream of requests of mixed lengths: continuous batching against fixed batches of the same requests.

    python benchmarks/request_stream.py --preset mamba-2.8b --requests 512 --out benchmarks/request_stream

Prompts of 128 to 8,192 random tokens and answers of 16 to 512, both drawn log-uniformly. In fixed batches,
the next `--sequences` requests start when the last of the batch before has ended. Memory is measured besides,
for one prompt of each length in `--lengths`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ssm_dist import LLM, SamplingParams
from ssm_dist.config import Config
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
        params.append(SamplingParams(max_new_tokens=log_uniform(16, 512), ignore_eos=True))
    return prompts, params


def timed(llm: LLM, prompts: list[Prompt], params: list[SamplingParams], batch: int) -> dict[str, float]:
    """Seconds and tokens a second, `batch` requests handed over at a time."""
    begin = time.perf_counter()
    tokens = 0
    for start in range(0, len(prompts), batch):
        done = llm.generate(prompts[start : start + batch], params[start : start + batch])
        tokens += sum(len(completion.token_ids) for completion in done)
    seconds = time.perf_counter() - begin
    return {"seconds": round(seconds, 2), "tokens/s": round(tokens / seconds, 1)}


def memory(llm: LLM, lengths: list[int]) -> dict[int, float]:
    """Peak MB beyond what is held at rest, by prompt length."""
    found = {}
    for length in lengths:
        torch.cuda.reset_peak_memory_stats()
        rest = torch.cuda.memory_allocated()
        llm.generate([[1 + i % 499 for i in range(length)]], SamplingParams(max_new_tokens=1))
        found[length] = round((torch.cuda.max_memory_allocated() - rest) / 1e6, 1)
    return found


def main() -> None:
    """Write NAME.json into --out, and print it as the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="mamba-2.8b")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--longest", type=int, default=8192, help="tokens of a prompt")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--lengths", type=int, nargs="*", default=[2**n for n in range(10, 19)])
    options = parser.parse_args()
    sections = {"model": {"preset": options.preset}, "cache": {"max_sequences": options.sequences}}
    llm = LLM.from_config(Config.model_validate(sections))
    prompts, params = requests(options)
    timed(llm, prompts[:4], params[:4], 4)
    result: dict[str, Any] = {
        "command": f"benchmarks/request_stream.py {' '.join(sys.argv[1:])}",
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "continuous": timed(llm, prompts, params, len(prompts)),
        "fixed batches": timed(llm, prompts, params, options.sequences),
    }
    if torch.cuda.is_available():
        result["peak MB by prompt length"] = memory(llm, options.lengths)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.preset}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
