"""What `decode_layers` and its kernel, `gluon_layers`, both have to know. A CPU reads it without Triton."""

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

ROUND = 1024
"""Numbers that the threads hold at a time, four each; what a vector lacks of the last round is zero."""

SCRATCH_BYTES = 4 * ROUND
"""Of shared memory, for x_proj's outputs."""

PRODUCT_BYTES = 2 * WARPS * CHANNELS * 4
"""Of shared memory: each warp's share of the products with x and z."""


def piece_bytes(chunks: int) -> int:
    """Of shared memory, with the barriers of its arrival and release."""
    return WARPS * row_bytes(chunks) + 16


def row_bytes(chunks: int) -> int:
    """From row to row of a piece of the ring, so that rows begin in other banks."""
    return chunks * 512 + 64
