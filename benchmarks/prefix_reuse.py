"""What a known prefix saves: time to first token cold and warm, and a conversation with and without reuse.

    python benchmarks/prefix_reuse.py --preset mamba-2.8b --out benchmarks/prefix_reuse
    torchrun --standalone --nproc-per-node 2 benchmarks/prefix_reuse.py --preset falcon-mamba-7b --out ...

Prompts are random token ids. Cold: nothing is known. Warm: everything but the last `--fresh` tokens is.
Alone: a prompt of `--fresh` tokens, which is the part of warm that is not reuse. Times begin with the call:
they hold everything from the check of the ids to the token in the caller's hands. In the conversation, every
turn's prompt is all that was said and `--fresh` tokens more.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

import reporting

from ssm_dist import LLM, SamplingParams
from ssm_dist.config import Config

WARM_UP = 2
"""Runs before those that count: the first one compiles kernels, the second one captures steps."""


def first_token(llm: LLM, prompt: list[int]) -> float:
    """Milliseconds from the call to the first token."""
    begin = time.perf_counter()
    next(llm.stream([prompt], SamplingParams(max_new_tokens=1, ignore_eos=True)))
    return (time.perf_counter() - begin) * 1e3


def cold_and_warm(llm: LLM, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians over several prompts, with the least and the most."""
    times: dict[str, list[float]] = {"cold": [], "warm": [], "alone": []}
    for seed in range(WARM_UP + options.repeats):
        ids = random.Random(seed).choices(range(1, 500), k=options.tokens)
        saved = llm.prefixes.counters.tokens_saved
        times["cold"].append(first_token(llm, ids[: -options.fresh]))
        assert llm.prefixes.counters.tokens_saved == saved, "this prompt is known already"
        times["warm"].append(first_token(llm, ids))
        assert llm.prefixes.counters.tokens_saved == saved + options.tokens - options.fresh
        times["alone"].append(first_token(llm, ids[-options.fresh :]))
    counted = {name: each[WARM_UP:] for name, each in times.items()}
    cold = statistics.median(counted["cold"])
    return [
        {
            "prompt": name,
            "tokens": {"cold": options.tokens - options.fresh, "warm": options.tokens}.get(
                name, options.fresh
            ),
            "time to first token, ms": round(statistics.median(each), 2),
            "least": round(min(each), 2),
            "most": round(max(each), 2),
            "times faster than cold": round(cold / statistics.median(each), 1),
        }
        for name, each in counted.items()
    ]


def conversation(llm: LLM, options: argparse.Namespace, seed: int, answer: int) -> list[dict[str, float]]:
    """One row a turn: tokens of the prompt, milliseconds to the first token and to the last."""
    draw, history, turns = random.Random(seed), list[int](), []
    params = SamplingParams(max_new_tokens=answer, ignore_eos=True)
    for turn in range(options.turns):
        count = options.tokens // 8 if turn == 0 else options.fresh
        history = history + draw.choices(range(1, 500), k=count)
        completion = llm.generate([history], params)[0]
        first, last = completion.seconds_to_first_token or 0.0, completion.seconds or 0.0
        turns.append({"tokens": len(history), "first": round(first * 1e3, 2), "all": round(last * 1e3, 2)})
        history = history + completion.token_ids
    return turns


def measured_conversation(llm: LLM, options: argparse.Namespace) -> list[dict[str, float]]:
    """As `conversation`, after others of the same lengths."""
    for seed in range(WARM_UP):
        conversation(llm, options, 1000 + seed, answer=1)
    return conversation(llm, options, 1000 + WARM_UP, options.answer)


def compared(with_reuse: list[dict[str, float]], without: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Turn by turn, and all together."""
    rows: list[dict[str, Any]] = [
        {
            "turn": turn,
            "tokens": int(one["tokens"]),
            "first token with reuse, ms": one["first"],
            "without, ms": other["first"],
            "answer with reuse, ms": one["all"],
            "without": other["all"],
        }
        for turn, (one, other) in enumerate(zip(with_reuse, without, strict=True), start=1)
    ]
    sums = {key: round(sum(row[key] for row in rows), 1) for key in list(rows[0])[1:]}
    return [*rows, {"turn": "all", **sums}]


def job(options: argparse.Namespace, flags: list[str], device_bytes: int) -> Config:
    """One sequence, with so many bytes for reuse."""
    cache = {"max_sequences": 1, "max_tokens": 2 * options.tokens, "prefix_interval": options.chunk}
    return reporting.configuration(
        options.preset,
        flags,
        cache=cache | {"prefix_device_bytes": device_bytes},
        prefill={"chunk_tokens": options.chunk},
    )


def main() -> reporting.Report:
    """Run all parts."""
    parser = reporting.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--fresh", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a step, and between two snapshots")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--answer", type=int, default=16, help="tokens of an answer in the conversation")
    options, flags = parser.parse_known_args()
    config = job(options, flags, device_bytes=2 << 30)
    report = reporting.Report(options.out, options.preset, config)
    llm = LLM(report.loaded, config)
    report.add("time to first token", cold_and_warm(llm, options))
    with_reuse = measured_conversation(llm, options)
    report.add("counters", [vars(llm.prefixes.counters)])
    del llm
    without = measured_conversation(LLM(report.loaded, job(options, flags, device_bytes=0)), options)
    report.add("conversation", compared(with_reuse, without))
    return report


if __name__ == "__main__":
    reporting.run(main)
