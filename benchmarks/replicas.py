"""Replicas against tensor parallelism: processes of one GPU each share the prompts of a case evenly.

    PYTHONPATH=. python benchmarks/replicas.py --replicas 2 --cases 64x2048+128 --out replicas.json

All replicas start every run together, and a run lasts until the slowest is done. The document that is
written, and printed as the last line, joins with those of [benchmark] in `ssm-dist report`, on as many GPUs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ssm_dist.benchmark.cases import parse_case
from ssm_dist.provenance import command

PATIENCE = 300.0
"""Seconds that a replica waits for the others."""
MAXIMA = {"prefill_seconds", "request_seconds"}


def replica(index: int, options: argparse.Namespace, together: Any, answers: Connection) -> None:
    """One process: measure this replica's share of every case, and send the rows."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(index)  # before CUDA starts
    import torch

    from ssm_dist import LLM, Config
    from ssm_dist.benchmark.breakdown import WARMUP
    from ssm_dist.benchmark.cases import Case
    from ssm_dist.benchmark.program import engine_of, named, new_document
    from ssm_dist.benchmark.timing import time_case

    cases = [parse_case(written) for written in options.cases]
    shares = [Case(case.batch // options.replicas, case.prompt_tokens, case.new_tokens) for case in cases]
    sequences = max(share.batch for share in shares)
    tokens = max(share.batch * (share.prompt_tokens + share.new_tokens + 16) for share in shares)
    config = Config.model_validate(
        {
            "model": {"preset": options.model},
            "cache": {"max_sequences": sequences, "max_tokens": tokens},
            "prefill": {"chunk_tokens": options.chunk_tokens},
        }
    )
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.replicas))
    llm = LLM.from_config(config)
    told = named(config) | engine_of(llm)
    rows = [
        told | asdict(case) | time_case(llm, share, options.repeats, WARMUP, None, together.wait)
        for case, share in zip(cases, shares, strict=True)
    ]
    answers.send((new_document(config, llm.loaded.device, None), rows))


def joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One case's rows of all replicas as one row, on as many GPUs."""
    row = rows[0] | {"degree": len(rows), "replicas": len(rows)}
    if any("error" in other for other in rows):
        return row
    for key in MAXIMA & row.keys():
        slowest = [max(times) for times in zip(*(other[key]["all"] for other in rows), strict=True)]
        row[key] = {
            "min": min(slowest), "median": statistics.median(slowest), "max": max(slowest), "all": slowest,
        }  # fmt: skip
    row["prefill_tokens_per_second"] = round(
        row["batch"] * row["prompt_tokens"] / row["prefill_seconds"]["median"], 1
    )
    if "request_seconds" in row:
        row["output_tokens_per_second"] = round(
            row["batch"] * row["new_tokens"] / row["request_seconds"]["median"], 1
        )
        if row["decode_ms_a_step"]:
            step = max(other["decode_ms_a_step"] for other in rows)
            row |= {"decode_ms_a_step": step, "decode_tokens_per_second": round(1e3 * row["batch"] / step, 1)}
    return row


def main() -> None:
    """Start the replicas, join their rows, and write the document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="mamba-2.8b", help="a preset")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--cases", nargs="+", default=["64x2048+128", "8x16384+128"])
    parser.add_argument("--chunk-tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if any(parse_case(written).batch % options.replicas for written in options.cases):
        parser.error(f"{options.replicas} replicas must share the prompts of every case evenly")
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(options.replicas, timeout=PATIENCE)
    processes, answers = [], []
    for index in range(options.replicas):
        ours, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=replica, args=(index, options, together, theirs)))
        processes[-1].start()
        theirs.close()
        answers.append(ours)
    try:
        documents, rows = zip(*(answer.recv() for answer in answers), strict=True)
    except EOFError:
        sys.exit("a replica has failed; its message is above")
    finally:
        together.abort()
        for process in processes:
            process.join()
    document = documents[0] | {"command": command("benchmarks/replicas.py", sys.argv[1:])}
    hardware = document["environment"]["hardware"].removeprefix("1 x ")
    document["environment"]["hardware"] = f"{options.replicas} x {hardware}"
    document["cases"] = [joined(list(of_case)) for of_case in zip(*rows, strict=True)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
