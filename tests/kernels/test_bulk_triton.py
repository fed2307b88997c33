"""The kernel of long messages in the interpreter, several ranks in one process, one phase after the other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ssm_dist.kernels import backend, norm
from ssm_dist.kernels.codecs import decode_rows, encode_rows, row_layout
from tests.kernels.codec_bounds import sum_by_codec_ops
from tests.kernels.playing_ranks import BulkRanks

pytestmark = pytest.mark.usefixtures("triton_backend")

CODECS = [("none", 128), ("int8", 128), ("fp8", 32), ("int4", 32)]
each_codec = pytest.mark.parametrize(("codec", "group_size"), CODECS, ids=str)


def in_phases(ranks: int, call: Callable[[int, int], Any]) -> list[Any]:
    """call(rank, phase) for every rank and phase; what the last phase returns, by rank."""
    for phase in (0, 1):
        for rank in range(ranks):
            call(rank, phase)
    return [call(rank, 2) for rank in range(ranks)]


def defined_sum(parts: Tensor, codec: str, group_size: int) -> Tensor:
    """What the definitions of the codecs make of it."""
    with backend.using("reference"):
        return sum_by_codec_ops(parts, codec, group_size)


@pytest.mark.parametrize(("ranks", "rows", "width"), [(2, 1, 40), (2, 19, 600), (3, 7, 37), (4, 21, 130)])
@each_codec
def test_all_ranks_hold_the_bits_of_the_codec_ops(
    codec: str, group_size: int, ranks: int, rows: int, width: int
) -> None:
    from ssm_dist.kernels.triton_bulk import bulk_sum

    world, parts = BulkRanks(ranks, 2**20), torch.randn(ranks, rows, width)
    for _ in range(2):
        y = torch.full_like(parts, torch.nan)

        def call(rank: int, phase: int, x: Tensor = parts, y: Tensor = y) -> None:
            bulk_sum(x[rank], codec, group_size, world.memories[rank], phase, y=y[rank])

        in_phases(ranks, call)
        assert torch.equal(y, defined_sum(parts, codec, group_size).expand_as(y))
        parts = parts.flip(1)


@pytest.mark.parametrize("given", ["whole", "stripe", "none"])
@pytest.mark.parametrize(("ranks", "rows", "width"), [(2, 19, 600), (3, 7, 40)])
@each_codec
def test_the_owners_add_their_rows_of_the_residual_and_send_the_norm(
    codec: str, group_size: int, ranks: int, rows: int, width: int, given: str
) -> None:
    from ssm_dist.kernels.triton_bulk import bulk_sum_add_rms_norm

    world, parts = BulkRanks(ranks, 2**20), torch.randn(ranks, rows, width)
    residual, weight, stripe = torch.randn(rows, width), torch.randn(width), -(-rows // ranks)
    padded = torch.nn.functional.pad(residual, (0, 0, 0, ranks * stripe - rows))
    with backend.using("reference"):
        layout = (width, torch.float32, codec, group_size)
        sent = torch.stack([decode_rows(encode_rows(part, *layout[2:], rows), *layout) for part in parts])
        for rank in range(ranks):
            own = slice(rank * stripe, (rank + 1) * stripe)
            sent[rank, own] = parts[rank, own]
        stream = sent.sum(0) + (residual if given != "none" else 0)
        normed = norm.add_rms_norm_reference(None, stream, weight, 1e-5)[0]
        expected = decode_rows(encode_rows(normed, codec, group_size, rows), *layout)
    totals = [torch.full((stripe, width), torch.nan) for _ in range(ranks)]
    ys = torch.full_like(parts, torch.nan)

    def call(rank: int, phase: int) -> Any:
        own = {"whole": residual, "stripe": padded[rank * stripe : (rank + 1) * stripe], "none": None}[given]
        return bulk_sum_add_rms_norm(
            parts[rank], own, weight, 1e-5, codec, group_size, world.memories[rank], phase,
            y=ys[rank], total=totals[rank],
        )  # fmt: skip

    outputs = in_phases(ranks, call)
    step = {"none": 1e-5, "int8": 0.05, "fp8": 0.4, "int4": 0.8}[codec]
    for y, _ in outputs:
        assert torch.equal(y, outputs[0][0])
        assert_close(y, expected, rtol=1e-5, atol=step)  # a number near the middle may take the next step
        assert (y - expected).abs().gt(1e-5).float().mean() < 0.01
    assert_close(torch.cat(totals)[:rows], stream, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("codec", "group_size"), [("none", 128), ("int8", 32)], ids=str)
def test_as_many_programs_as_one_likes_make_the_same_bits(codec: str, group_size: int) -> None:
    from ssm_dist.kernels.triton_bulk import bulk_sum, bulk_sum_add_rms_norm

    world, parts, weight = BulkRanks(2, 2**20), torch.randn(2, 17, 1100), torch.randn(1100)

    def results(programs: int | None) -> list[Tensor]:
        """The sum, its norm and the stream, by rank; three tiles of five chunks a stripe."""
        y, normed, total = torch.zeros_like(parts), torch.zeros_like(parts), torch.zeros(2, 9, 1100)

        def call(rank: int, phase: int) -> None:
            how = (codec, group_size, world.memories[rank], phase, programs)
            bulk_sum(parts[rank], *how, y[rank])

        def with_norm(rank: int, phase: int) -> None:
            how = (codec, group_size, world.memories[rank], phase, programs)
            bulk_sum_add_rms_norm(parts[rank], None, weight, 1e-5, *how, normed[rank], total[rank])

        in_phases(2, call)
        in_phases(2, with_norm)
        return [y, normed, total]

    expected = results(None)
    assert torch.equal(expected[0], defined_sum(parts, codec, group_size).expand_as(parts))
    for programs in (2, 1):
        assert all(torch.equal(*pair) for pair in zip(results(programs), expected, strict=True))


@pytest.mark.parametrize("programs", [4, 3, 1])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("codec", "group_size"), [("none", 128), ("int8", 32)], ids=str)
def test_all_rounds_in_one_go_make_the_same_bits(
    codec: str, group_size: int, ranks: int, programs: int
) -> None:
    """Nobody waits here: a lone rank needs nobody, and of more, each pass of one sends what others missed."""
    from ssm_dist.kernels.triton_bulk import ALL, bulk_sum

    world, parts = BulkRanks(ranks, 2**20), torch.randn(ranks, 14 * ranks, 300)  # four tiles a stripe
    y = torch.full_like(parts, torch.nan)
    for _ in range(ranks):
        for rank, memory in enumerate(world.memories):
            bulk_sum(parts[rank], codec, group_size, memory, ALL, programs, y[rank])
    assert torch.equal(y, defined_sum(parts, codec, group_size).expand_as(y))


def test_programs_count_their_steps_alike_on_all_ranks_and_flag_them_to_the_others() -> None:
    from ssm_dist.kernels.triton_bulk import PROGRAMS, ROWS, bulk_sum

    world, expected = BulkRanks(3, 2**18), torch.zeros(PROGRAMS, dtype=torch.int32)
    for tiles, programs in [(5, 2), (1, 4), (7, 4), (3, 3), (5, 1)]:
        parts = torch.randn(3, 3 * (ROWS * tiles - 1), 40)

        def call(rank: int, phase: int, x: Tensor = parts, programs: int = programs) -> None:
            bulk_sum(x[rank], "none", 32, world.memories[rank], phase, programs)

        in_phases(3, call)
        for program in range(min(programs, tiles)):
            rounds = len(range(program, tiles, programs))
            expected[program] += rounds + 1
        for rank, (memory, buffer) in enumerate(zip(world.memories, world.buffers, strict=True)):
            flags = buffer[: 3 * PROGRAMS * 4].view(torch.int32).view(3, PROGRAMS)
            assert torch.equal(memory.epochs, expected)
            assert all(torch.equal(flags[sender], expected) for sender in range(3) if sender != rank)


def test_calls_of_any_shape_and_codec_share_the_regions() -> None:
    from ssm_dist.kernels.triton_bulk import bulk_sum, rows_that_fit

    world = BulkRanks(2, 16 * 1024)
    for rows, width, codec in [(8, 300, "int8"), (30, 40, "none"), (2, 1030, "int4"), (8, 300, "none")]:
        assert rows <= rows_that_fit(width, torch.float32, codec, 32, world.memories[0])
        parts = torch.randn(2, rows, width)
        y = torch.full_like(parts, torch.nan)

        def call(rank: int, phase: int, x: Tensor = parts, y: Tensor = y, codec: str = codec) -> None:
            bulk_sum(x[rank], codec, 32, world.memories[rank], phase, y=y[rank])

        in_phases(2, call)
        assert torch.equal(y, defined_sum(parts, codec, 32).expand_as(y))


def test_what_does_not_fit_is_refused() -> None:
    from ssm_dist.kernels.triton_bulk import bulk_sum, row_bytes, rows_that_fit

    world = BulkRanks(2, 16 * 1024)
    most = rows_that_fit(300, torch.float32, "none", 32, world.memories[0])
    size = row_bytes(row_layout(300, torch.float32, "none", 32))
    assert size == 1280 and most == 2 * (16 * 1024 // (2 * size))
    with pytest.raises(AssertionError, match="rows_that_fit"):
        bulk_sum(torch.zeros(most + 1, 300), "none", 32, world.memories[0], 0)
