"""Memory against the length of the prompt: peak bytes of the device beyond what is held at rest.

    python benchmarks/memory_vs_prompt.py --preset mamba-2.8b --out benchmarks/memory_vs_prompt

Prompts are read in chunks of `--chunk` tokens, so that the peak is that of one chunk for all that are longer.
Steps run uncaptured, since what a captured step holds counts as free between its replays. Needs a GPU;
`tests/engine/test_prompt_memory.py` shows the same on a CPU.
"""

from __future__ import annotations

import time
from typing import Any

import reporting
import torch

from ssm_dist import LLM, SamplingParams


def measure(llm: LLM, length: int) -> dict[str, Any]:
    """One prompt of random tokens."""
    ids = torch.randint(1, 500, (length,)).tolist()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    rest = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    llm.generate([ids], SamplingParams(max_new_tokens=1, ignore_eos=True))
    seconds = time.perf_counter() - begin
    return {
        "prompt tokens": length,
        "peak MB": round((torch.cuda.max_memory_allocated() - rest) / 1e6, 2),
        "MB at rest": round(rest / 1e6, 1),
        "MB reserved": round(torch.cuda.max_memory_reserved() / 1e6, 1),
        "state MB": round(llm.cache.slot_bytes / 1e6, 2),
        "tokens/s": round(length / seconds),
    }


def main() -> reporting.Report:
    """All lengths, the shortest first; each is the second run of its length."""
    parser = reporting.parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(10, 19)])
    parser.add_argument("--chunk", type=int, default=8192)
    options, flags = parser.parse_known_args()
    cache = {"max_sequences": 1, "max_tokens": 2 * max(options.lengths)}
    config = reporting.configuration(
        options.preset,
        flags,
        cache=cache,
        prefill={"chunk_tokens": options.chunk},
        compile={"mode": "none"},
    )
    report = reporting.Report(options.out, options.preset, config)
    llm = LLM(report.loaded, config)
    rows = []
    for length in options.lengths:
        measure(llm, min(length, 2 * options.chunk))
        rows.append(measure(llm, length))
        report.add("peak memory beyond rest, by prompt length", rows)
    return report


if __name__ == "__main__":
    reporting.run(main)
