"""The kernel of long messages: rounds of tiles, and flags between the ranks; see `triton_bulk`."""

import triton
import triton.language as tl

from ssm_dist.kernels.triton_bulk_tiles import add_up, collect, peer, send_parts
from ssm_dist.kernels.triton_remote import raise_flag, wait_for_flag


# rank: the same code on all ranks, so that their bits agree; the others: nothing to gain from compiling again
@triton.jit(do_not_specialize=["rank", "residual_row", "rows", "stripe"])
def bulk_kernel(
    x, residual, weight, y, total, eps,
    rows, width, halves, stripe, residual_row, row_bytes, scales_at,
    rank, peers, epochs, error, limit, parts_at, sums_at,
    RANKS: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr, WITH_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, CODE: tl.constexpr, FLAGS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, PHASE: tl.constexpr,
    SEND_AHEAD: tl.constexpr, ADD_AHEAD: tl.constexpr, NORM_AHEAD: tl.constexpr, COLLECT_AHEAD: tl.constexpr,
):  # fmt: skip
    """One program: every num_programs-th tile of ROWS rows, of all stripes of `stripe` rows, a tile a round.

    parts_at, sums_at: offsets of the regions; residual_row: the row of `residual` that this rank's stripe
    begins at; FLAGS: bytes of a rank's flags; PHASE: ALL, or one of them, for all rounds. The rest: see
    `BulkMemory` and `triton_codec_tiles`.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    epoch = tl.load(epochs + program)
    rounds = tl.cdiv(tl.cdiv(stripe, ROWS) - program, programs)  # the same on all ranks
    failed, own = error.to(tl.int64), peers[RANKS - 1]

    for step in tl.range(0, rounds + 2, disable_licm=True):  # what phases begin with takes too many registers
        tile = program + step * programs
        if (PHASE <= 0) & (step < rounds):
            for other in range(RANKS - 1):
                send_parts(
                    x, peer(peers, other, RANKS) + parts_at, tile, (rank + 1 + other) % RANKS * stripe,
                    rank * stripe, rows, width, halves, stripe, row_bytes, scales_at,
                    CODEC, GROUP, ROWS, CHUNK, SEND_AHEAD,
                )  # fmt: skip
        if (PHASE != 0) & (step > 0):
            for other in range(RANKS - 1):
                sender = (rank + 1 + other) % RANKS
                flag = own + sender * FLAGS + program * 4
                wait_for_flag(flag, epoch + step, failed, limit, CODE + sender)
            tl.debug_barrier()
        if ((PHASE < 0) | (PHASE == 1)) & (step > 0) & (step <= rounds):
            add_up(
                x, residual, weight, y, total, eps, own + parts_at, peers, sums_at, rank, residual_row,
                tile - programs, rows, width, halves, stripe, row_bytes, scales_at,
                RANKS, CODEC, GROUP, WITH_NORM, HAS_RESIDUAL, ROWS, CHUNK, ADD_AHEAD, NORM_AHEAD,
            )  # fmt: skip
        if ((PHASE < 0) | (PHASE == 2)) & (step > 1):
            for other in range(RANKS - 1):
                collect(
                    y, own + sums_at, tile - 2 * programs, (rank + 1 + other) % RANKS * stripe, rows, width,
                    halves, stripe, row_bytes, scales_at, CODEC, GROUP, ROWS, CHUNK, COLLECT_AHEAD,
                )  # fmt: skip
        if (PHASE != 2) & (step <= rounds):
            tl.debug_barrier()
            for other in range(RANKS - 1):
                raise_flag(peer(peers, other, RANKS) + rank * FLAGS + program * 4, epoch + step + 1)
    if (PHASE < 0) | (PHASE == 2):
        tl.store(epochs + program, epoch + rounds + 1)
