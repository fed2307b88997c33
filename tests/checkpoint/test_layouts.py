"""Reading by slices gives the same as reordering the whole tensor, and saving undoes it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssm_dist.checkpoint.layouts import (
    Blocks,
    ConvWeight,
    Headwise,
    HeadwiseTransposed,
    Identity,
    Layout,
    PackedInterleaved,
    PaddedRows,
    Transposed,
)


@dataclass
class CountingSource:
    """A stored tensor that counts the elements read from it."""

    tensor: Tensor
    read: int = field(default=0)

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, index: Any) -> Tensor:
        piece = self.tensor[index]
        self.read += piece.numel()
        return piece


CASES: dict[str, tuple[Layout, tuple[int, ...]]] = {
    "identity": (Identity(), (24, 12)),
    "vector": (Identity(), (24,)),
    "conv": (ConvWeight(), (24, 4)),
    "transposed": (Transposed(), (24, 12)),
    "one head": (Headwise(1), (24, 3)),
    "heads": (Headwise(3), (24, 4)),
    "headwise vector": (Headwise(2), (24,)),
    "headwise transposed": (HeadwiseTransposed(2), (24, 12)),
    "headwise transposed, three heads": (HeadwiseTransposed(3), (24, 12)),
    "packed": (Blocks(2), (2, 24, 12)),
    "packed bias": (Blocks(2), (2, 24)),
    "heads out": (Blocks(4), (4, 6, 12)),
    "heads in": (Blocks(4, at=1), (12, 4, 6)),
    "interleaved": (PackedInterleaved(), (2, 24, 12)),
    "interleaved bias": (PackedInterleaved(), (2, 24)),
}


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
def test_slices_join_to_the_whole_and_saving_inverts_reading(name: str, data: st.DataObject) -> None:
    layout, shape = CASES[name]
    stored = numbered(layout.huggingface_shape(shape))
    whole = layout.read(CountingSource(stored), None, 0, shape[0])
    assert whole.shape == shape
    assert torch.equal(layout.to_huggingface(whole), stored)

    dim = data.draw(st.integers(0, len(shape) - 1))
    degree = data.draw(st.sampled_from([d for d in range(1, shape[dim] + 1) if shape[dim] % d == 0]))
    length = shape[dim] // degree
    sources = [CountingSource(stored) for _ in range(degree)]
    slices = [layout.read(source, dim, rank * length, length) for rank, source in enumerate(sources)]
    assert torch.equal(torch.cat(slices, dim), whole)
    assert all(source.read == stored.numel() // degree for source in sources)


@given(rows=st.integers(1, 40), degree=st.integers(1, 8), width=st.integers(1, 3))
def test_vocabulary_rows_past_the_end_are_zero_also_where_a_rank_has_no_others(
    rows: int, degree: int, width: int
) -> None:
    layout, length = PaddedRows(rows), -(-rows // degree) + 1
    stored = 1 + numbered((rows, width))
    shape = (degree * length, width)
    assert layout.huggingface_shape(shape) == stored.shape
    slices = [layout.read(CountingSource(stored), 0, rank * length, length) for rank in range(degree)]
    padded = torch.cat(slices)
    assert torch.equal(padded, torch.cat([stored, torch.zeros(shape[0] - rows, width)]))
    assert torch.equal(layout.read(CountingSource(stored), None, 0, shape[0]), padded)
    assert torch.equal(layout.to_huggingface(padded), stored)


def test_packed_layouts_separate_x_from_z() -> None:
    x, z = numbered((3, 2)), -1 - numbered((3, 2))
    ours = torch.stack([x, z])
    assert torch.equal(Blocks(2).to_huggingface(ours), torch.cat([x, z]))
    interleaved = PackedInterleaved().to_huggingface(ours)
    assert torch.equal(interleaved[0::2], x)
    assert torch.equal(interleaved[1::2], z)


def test_headwise_projections_are_those_of_each_head() -> None:
    stored = numbered((2, 5, 3))  # heads, outputs, channels a head
    ours = HeadwiseTransposed(2).read(CountingSource(stored), None, 0, 6)
    assert torch.equal(ours[4], stored[1, :, 1])  # channel 4 is the second head's channel 1
