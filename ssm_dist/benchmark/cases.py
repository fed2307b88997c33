"""What is measured: B prompts of P random tokens that arrive together, with G new tokens each."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ssm_dist.config import BenchmarkConfig
from ssm_dist.errors import UserError
from ssm_dist.requests import Prompt

_WRITTEN = re.compile(r"(\d+)x(\d+)\+(\d+)")


@dataclass(frozen=True)
class Case:
    """Written as BxP+G."""

    batch: int
    prompt_tokens: int
    new_tokens: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.prompt_tokens}+{self.new_tokens}"

    def prompts(self, vocab_size: int) -> list[Prompt]:
        """Token ids, the same on every call."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab_size, (self.batch, self.prompt_tokens), generator=generator)
        return list[Prompt](ids.tolist())


def parse_case(written: str) -> Case:
    """The case that "64x2048+128" names. Raises `UserError` for what is none."""
    found = _WRITTEN.fullmatch(written)
    numbers = [int(number) for number in found.groups()] if found else [0]
    if min(numbers) < 1:
        raise UserError(
            f"[benchmark] cases has {written!r}; write prompts x tokens + new tokens, as in '64x2048+128'"
        )
    return Case(*numbers)


def cases_of(grid: BenchmarkConfig) -> list[Case]:
    """The grid's cases, then the others, each once. Raises as `parse_case`."""
    product = [
        Case(batch, prompt, new)
        for batch in grid.batches
        for prompt in grid.prompt_tokens
        for new in grid.new_tokens
    ]
    return list(dict.fromkeys([*product, *map(parse_case, grid.cases)]))
