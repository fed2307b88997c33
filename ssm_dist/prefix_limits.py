"""How much prefix reuse may hold, and what it has brought."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssm_dist.config import CacheConfig
from ssm_dist.errors import UserError


@dataclass(frozen=True)
class PrefixLimits:
    """How many snapshots are taken and kept, on each rank."""

    interval: int
    """Tokens between two snapshots of a prompt."""
    host_bytes: int = 0
    folder: Path | None = None
    folder_bytes: int = 0


@dataclass
class PrefixCounters:
    """What reuse has brought so far."""

    hits: int = 0
    misses: int = 0
    tokens_saved: int = 0
    """Prompt tokens that were not computed again."""
    snapshots: int = 0
    """Taken in all."""


def prefix_limits(asked: CacheConfig, chunk_tokens: int) -> PrefixLimits | None:
    """None where no level has a budget. Raises `UserError` for settings that do not go together."""
    if asked.prefix_folder is not None and not asked.prefix_folder.is_dir():
        raise UserError(f"[cache] prefix_folder: there is no folder {asked.prefix_folder}")
    if (asked.prefix_folder is None) != (asked.prefix_folder_bytes == 0):
        raise UserError("[cache] prefix_folder and prefix_folder_bytes go together: set both, or neither")
    if not (asked.prefix_device_bytes or asked.prefix_host_bytes or asked.prefix_folder_bytes):
        return None
    chunk_grid(asked.prefix_interval, chunk_tokens)
    return PrefixLimits(
        asked.prefix_interval, asked.prefix_host_bytes, asked.prefix_folder, asked.prefix_folder_bytes
    )


def chunk_grid(interval: int, chunk_tokens: int) -> int:
    """Places at whose multiples chunks of prompts end, so that a snapshot's place is always such an end.

    With it, the chunks of a prompt are the same whether it starts from a snapshot or not, and whatever runs
    beside it. Raises `UserError` when the interval and the chunk do not go together.
    """
    grid = min(interval, chunk_tokens)
    if interval % grid:
        raise UserError(
            f"[cache] prefix_interval = {interval} must be a multiple of [prefill] chunk_tokens = "
            f"{chunk_tokens}, or at most as large"
        )
    return grid
