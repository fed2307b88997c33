"""What the ranks of the benchmark's tests run."""

from __future__ import annotations

from typing import Any

from ssm_dist import Config
from ssm_dist.benchmark.program import run_benchmark


def configuration(preset: str, degree: int = 1, max_tokens: int = 4096, **benchmark: Any) -> Config:
    quick = {"repeats": 1, "warmup": 0, "breakdown": False}
    return Config.model_validate(
        {
            "model": {"preset": preset},
            "parallel": {"tensor": degree},
            "cache": {"max_sequences": 2, "max_tokens": max_tokens},
            "prefill": {"chunk_tokens": 32},
            "benchmark": quick | benchmark,
        }
    )


def measured(config: Config) -> tuple[dict[str, Any], int]:
    """The document, and how often it was saved on the way."""
    saved = []
    return run_benchmark(config, saved.append), len(saved)
