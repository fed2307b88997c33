"""Sums by the copy engines in the interpreter, several ranks in one process, one step after the other."""

import pytest
import torch
from torch import Tensor

from ssm_dist.kernels.codecs import row_layout
from tests.kernels.playing_ranks import BulkRanks

pytestmark = pytest.mark.usefixtures("triton_backend")

CODECS = [("none", 128), ("int8", 128), ("fp8", 32), ("int4", 32)]

CASES = [
    (torch.bfloat16, 2, 19, 600, "stripe"), (torch.float32, 3, 7, 40, "whole"),
    (torch.bfloat16, 3, 2, 37, "none"), (torch.bfloat16, 4, 21, 130, "stripe"),
]  # fmt: skip
"""Of what, ranks, rows, width, and which rows of a residual each rank has."""


@pytest.mark.parametrize(("dtype", "ranks", "rows", "width", "given"), CASES, ids=str)
@pytest.mark.parametrize(("codec", "group_size"), CODECS, ids=str)
def test_they_have_the_bits_of_the_kernel_of_long_messages(
    dtype: torch.dtype, codec: str, group_size: int, ranks: int, rows: int, width: int, given: str
) -> None:
    from ssm_dist.kernels.triton_bulk import bulk_sum_add_rms_norm
    from ssm_dist.kernels.triton_copied import CopiedSum

    world, stripe = BulkRanks(ranks, 2**20), -(-rows // ranks)
    for _ in range(2):  # the second sum finds what the first one left
        parts = torch.randn(ranks, rows, width).to(dtype)
        residual, weight = torch.randn(rows, width), torch.randn(width).to(dtype)
        padded = torch.nn.functional.pad(residual, (0, 0, 0, ranks * stripe - rows))
        stripes = list(padded.split(stripe))
        mine = {"whole": [residual] * ranks, "stripe": stripes, "none": [None] * ranks}[given]
        expected: list[tuple[Tensor, Tensor]] = []
        for phase in range(3):
            expected = [
                bulk_sum_add_rms_norm(
                    parts[rank], mine[rank], weight, 1e-5, codec, group_size, world.memories[rank], phase,
                    y=expected[rank][0] if phase else None, total=expected[rank][1] if phase else None,
                )
                for rank in range(ranks)
            ]  # fmt: skip
        calls = [
            CopiedSum(parts[rank], mine[rank], weight, 1e-5, codec, group_size, world.memories[rank])
            for rank in range(ranks)
        ]
        for step in (CopiedSum.send, CopiedSum.add_up, CopiedSum.collect):
            for call in calls:
                step(call)
        for rank, (call, (y, total)) in enumerate(zip(calls, expected, strict=True)):
            real = max(0, min(stripe, rows - rank * stripe))
            assert torch.equal(call.y, y) and torch.equal(call.total[:real], total[:real])


def test_ranks_count_the_steps_alike() -> None:
    from ssm_dist.kernels.triton_bulk import PROGRAMS, flag_bytes
    from ssm_dist.kernels.triton_copied import FLAG, CopiedSum

    world, x = BulkRanks(3, 2**16), torch.randn(5, 40)
    for done in (1, 2):
        for memory in world.memories:
            CopiedSum(x, None, torch.ones(40), 1e-5, "none", 128, memory).meet()
        assert [int(memory.epochs[FLAG]) for memory in world.memories] == [done] * 3
    flags = [
        buffer[: flag_bytes(3)].view(torch.int32).view(3, PROGRAMS)[:, FLAG].tolist()
        for buffer in world.buffers
    ]
    assert flags == [[0, 2, 2], [2, 0, 2], [2, 2, 0]]
    assert row_layout(40, x.dtype, "none", 128).bytes == 160
