"""Index arithmetic of ragged batches, shared by the reference kernels."""

import torch
from torch import Tensor


def sequence_of_token(seq_offsets: Tensor, tokens: int) -> Tensor:
    """Which sequence each packed token belongs to.

    seq_offsets: (S + 1,) integer, rising from 0 to `tokens`; equal neighbours are empty sequences.
    Returns (tokens,) int64.
    """
    index = torch.arange(tokens, device=seq_offsets.device, dtype=seq_offsets.dtype)
    return torch.searchsorted(seq_offsets[1:].contiguous(), index, right=True)


def place_in_sequence(seq_offsets: Tensor, sequence: Tensor) -> Tensor:
    """Distance of each token from the first token of its sequence in this batch, (T,) int64."""
    index = torch.arange(sequence.shape[0], device=sequence.device)
    return index - seq_offsets.long()[sequence]
