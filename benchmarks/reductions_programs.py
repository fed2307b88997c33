"""How many programs a sum of long messages should have: the section `programs` of `reductions.py`.

Measured is the kernel itself, launched with as many programs as it chooses, and with at most so many for each
multiprocessor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from reductions_ways import Run, Way, norm_inputs, normed, sharded_residual
from torch import Tensor

from ssm_dist.kernels.triton_bulk import BulkMemory, bulk_sum, bulk_sum_add_rms_norm
from ssm_dist.parallel import TensorParallel
from ssm_dist.parallel.collectives.groups import group_named

if TYPE_CHECKING:
    from reductions import Bench

CODECS = (("none", 128), ("int8", 128))
COMPILED = ("bulk", "bulk int8/128")
"""Those of `reductions_ways` that compile the same kernels."""
ROWS, WIDTH = (16384, 8192), 2560
"""84 and 42 MB in bfloat16."""
MOST = [132 * each for each in (1, 2, 3, 4, 6, 8)]
"""Programs; an H100 has 132 multiprocessors."""


def programs(bench: Bench) -> None:
    """The section."""
    for codec, group_size in CODECS:
        named: dict[str, Way] = {f"{most} programs": (codec, group_size, most) for most in MOST}
        ways: dict[str, Way] = {"chosen": (codec, group_size, None), **named}
        for rows in ROWS:
            bench.case(f"plain {codec}", (rows, WIDTH), plain_launch, lambda whole: whole, ways)
            given = norm_inputs(rows, WIDTH, bench.device)
            bench.case(f"fused {codec}", (rows, WIDTH), fused_launch(*given), partial(normed, *given), ways)


def plain_launch(x: Tensor, tp: TensorParallel, codec: str, group_size: int, programs: int | None) -> Run:
    """The sum of x."""
    memory = _memory(tp)
    return lambda: bulk_sum(x, codec, group_size, memory, programs=programs)


def fused_launch(residual: Tensor, weight: Tensor) -> Callable[..., Run]:
    """Sums with residual and norm; the residual is split."""

    def make(x: Tensor, tp: TensorParallel, codec: str, group_size: int, programs: int | None) -> Run:
        how = (weight, 1e-5, codec, group_size, _memory(tp))
        own = sharded_residual(residual, tp)
        return lambda: bulk_sum_add_rms_norm(x, own, *how, programs=programs)[0]

    return make


def _memory(tp: TensorParallel) -> BulkMemory:
    memory = group_named(tp.group).memory
    assert memory is not None, "the section `programs` needs GPUs that share memory"
    return memory.bulk
