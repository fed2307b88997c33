"""What `decode_layers` and its kernels both have to know. A CPU reads it without Triton."""

WARPS = 8
"""That multiply; so many rows a piece."""

CHANNELS = 64
"""Of a program at most, and columns of out_proj's outputs."""

FIELDS = 16
"""Columns of the table of parameters, of which the first ten are used."""

VECTOR = 2048
"""The words of a vector are rounded up to a multiple of so many."""

X_WORDS = 1024
"""Words of a rank's memory for x_proj's outputs from each rank."""

INPUT_STRIDE = 2 * CHANNELS + 16
"""Bytes from sequence to sequence of x_proj's inputs, in other banks."""

ROUND = 1024
"""Numbers that the threads hold at a time, four each; what a vector lacks of the last round is zero."""

SCRATCH_BYTES = 4 * ROUND
"""Of shared memory, for x_proj's outputs."""

PRODUCT_BYTES = 2 * WARPS * CHANNELS * 4
"""Of shared memory: each warp's share of the products with x and z."""


def piece_bytes(chunks: int) -> int:
    """Of shared memory, with the barriers of its arrival and release."""
    return WARPS * row_bytes(chunks) + 16


def few_places(
    programs: int, d_model: int, chunks: int, outputs: int, rows: int, sequences: int
) -> tuple[int, ...]:
    """Where in shared memory, after the ring, is what `gluon_layers_few` calls `memory`; at last, the end.

    outputs: of x_proj; rows: of out_proj that a program has. What a layer's second half needs lies where its
    stream was: sums of x_proj's outputs, these outputs and the steps, and after them, behind a part of the
    mixer's output, out_proj's products, in whole turns.
    """
    columns = -(-rows // WARPS) * WARPS
    tile = CHANNELS * sequences * 4
    sums, totals = -(-outputs // programs) * programs * sequences * 4 + 2048, -(-sequences * outputs // ROUND)
    mixed = 64 * sequences + 2 * sequences * 256 * chunks + 2048
    steps = mixed + sums + totals * 2 * ROUND
    numbers = -(-sequences * (d_model + 2 * programs) // ROUND) * ROUND
    stream = 64 * (sequences + 1) + 2 * numbers
    starts = [0, mixed, mixed, mixed + sums, steps]
    starts.append(max(stream, steps + tile, mixed + WARPS * sequences * columns * 4))
    for size in WARPS * sequences * CHANNELS * 4, tile, INPUT_STRIDE * sequences, tile, 256:
        starts.append(starts[-1] + size)
    return tuple(starts)


def row_bytes(chunks: int) -> int:
    """From row to row of a piece of the ring, so that rows begin in other banks."""
    return chunks * 512 + 64
