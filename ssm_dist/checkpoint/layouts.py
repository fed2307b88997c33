"""How one of our parameters relates to the Hugging Face tensor that it is read from and saved to.

A layout is a pure change of shape and order, so it is described once and serves both ways. Reading takes a
slice of *our* parameter and touches only the matching part of the file: slicing first and reordering after
is right only if the slice is translated, which is what each `read` does.

Shape letters: D channels (d_inner), K convolution width, G heads, P channels a head (D = G * P), R the
outputs of x_proj, V rows of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Source(Protocol):
    """A tensor in a file, read by slices; what `safe_open(...).get_slice(name)` returns."""

    def get_shape(self) -> list[int]: ...

    def __getitem__(self, index: Any) -> Tensor: ...


class Layout(Protocol):
    """The relation between one of our parameters and one tensor of a checkpoint."""

    def huggingface_shape(self, shape: Shape) -> Shape:
        """The shape that the checkpoint's tensor must have, from our parameter's global shape."""
        ...

    def read(self, source: Source, dim: int | None, start: int, length: int) -> Tensor:
        """Our parameter's slice `[start, start + length)` along `dim`; `dim=None` asks for all of it.

        With `dim=None`, `start` is 0 and `length` the size of our first dimension. The result has the dtype
        and device of the source, and may be a view of the file.
        """
        ...

    def to_huggingface(self, tensor: Tensor) -> Tensor:
        """Our whole parameter as the checkpoint's tensor."""
        ...


@dataclass(frozen=True)
class Identity:
    """The same tensor in both."""

    def huggingface_shape(self, shape: Shape) -> Shape:
        return shape

    def read(self, source: Source, dim: int | None, start: int, length: int) -> Tensor:
        return _narrow(source, dim, start, length)

    def to_huggingface(self, tensor: Tensor) -> Tensor:
        return tensor


@dataclass(frozen=True)
class PaddedRows:
    """Ours (V_padded, ...), theirs (V, ...): rows past `rows` are ours alone, zero, and never saved."""

    rows: int

    def huggingface_shape(self, shape: Shape) -> Shape:
        return (self.rows, *shape[1:])

    def read(self, source: Source, dim: int | None, start: int, length: int) -> Tensor:
        assert dim in (None, 0), "a padded vocabulary is sharded by rows"
        stop = start + length
        real = source[min(start, self.rows) : min(stop, self.rows)]
        padding = real.new_zeros((length - real.shape[0], *real.shape[1:]))
        return torch.cat((real, padding)) if len(padding) else real

    def to_huggingface(self, tensor: Tensor) -> Tensor:
        return tensor[: self.rows]


@dataclass(frozen=True)
class ConvWeight:
    """Ours (D, K), theirs (D, 1, K): the weight of a depthwise `nn.Conv1d`."""

    def huggingface_shape(self, shape: Shape) -> Shape:
        return (shape[0], 1, shape[1])

    def read(self, source: Source, dim: int | None, start: int, length: int) -> Tensor:
        return _narrow(source, 2 if dim == 1 else dim, start, length).squeeze(1)

    def to_huggingface(self, tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(1)


@dataclass(frozen=True)
class Transposed:
    """Ours (D, R), theirs (R, D)."""

    def huggingface_shape(self, shape: Shape) -> Shape:
        return (shape[1], shape[0])

    def read(self, source: Source, dim: int | None, start: int, length: int) -> Tensor:
        return _narrow(source, None if dim is None else 1 - dim, start, length).T

    def to_huggingface(self, tensor: Tensor) -> Tensor:
        return tensor.T


@dataclass(frozen=True)
class Headwise:
    """Ours (D, ...), theirs (G, P, ...): channels of one head are contiguous."""

    heads: int

    def huggingface_shape(self, shape: Shape) -> Shape:
        return (self.heads, shape[0] // self.heads, *shape[1:])

    def read(self, source: Source, dim: int | None, start: int, length: int) -> Tensor:
        if dim == 0:
            spans = _spans(source.get_shape()[1], start, length)
            return _joined([source[head : head + 1, a:b].flatten(0, 1) for head, a, b in spans])
        return _narrow(source, None if dim is None else dim + 1, start, length).flatten(0, 1)

    def to_huggingface(self, tensor: Tensor) -> Tensor:
        return torch.unflatten(tensor, 0, (self.heads, -1))


@dataclass(frozen=True)
class HeadwiseTransposed:
    """Ours (D, R), theirs (G, R, P): one transposed projection a head."""

    heads: int

    def huggingface_shape(self, shape: Shape) -> Shape:
        return (self.heads, shape[1], shape[0] // self.heads)

    def read(self, source: Source, dim: int | None, start: int, length: int) -> Tensor:
        if dim == 0:
            spans = _spans(source.get_shape()[2], start, length)
            return _joined([source[head : head + 1, :, a:b].squeeze(0).T for head, a, b in spans])
        return _narrow(source, dim, start, length).mT.flatten(0, 1)

    def to_huggingface(self, tensor: Tensor) -> Tensor:
        return torch.unflatten(tensor, 0, (self.heads, -1)).mT


@dataclass(frozen=True)
class Blocks:
    """Ours (..., count, P, ...), theirs (..., count * P, ...): `count` blocks along their dimension `at`.

    `Blocks(2)` is Mamba's packed in_proj, all rows of x, then all rows of z; with the heads as blocks it is
    an attention projection, whose heads are its outputs (`at=0`) or its inputs (`at=1`).
    """

    count: int
    at: int = 0

    def huggingface_shape(self, shape: Shape) -> Shape:
        return (*shape[: self.at], shape[self.at] * shape[self.at + 1], *shape[self.at + 2 :])

    def read(self, source: Source, dim: int | None, start: int, length: int) -> Tensor:
        size = source.get_shape()[self.at] // self.count
        if dim == self.at:
            rows = _narrow(source, dim, start * size, length * size)
            return torch.unflatten(rows, dim, (length, size))
        if dim == self.at + 1:
            firsts = range(start, start + self.count * size, size)
            return torch.stack([_narrow(source, self.at, first, length) for first in firsts], dim=self.at)
        theirs = dim if dim is None or dim < self.at else dim - 1
        return torch.unflatten(_narrow(source, theirs, start, length), self.at, (self.count, size))

    def to_huggingface(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(self.at, self.at + 1)


@dataclass(frozen=True)
class PackedInterleaved:
    """Ours (2, D, ...), theirs (2 * D, ...): row 2j is x_j and row 2j + 1 is z_j."""

    def huggingface_shape(self, shape: Shape) -> Shape:
        return (2 * shape[1], *shape[2:])

    def read(self, source: Source, dim: int | None, start: int, length: int) -> Tensor:
        if dim == 0:
            return torch.stack([source[half::2] for half in range(start, start + length)])
        if dim == 1:
            rows = source[2 * start : 2 * (start + length)]
        else:
            rows = _narrow(source, None if dim is None else dim - 1, start, length)
        return torch.unflatten(rows, 0, (-1, 2)).transpose(0, 1)

    def to_huggingface(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1).flatten(0, 1)


def _narrow(source: Source, dim: int | None, start: int, length: int) -> Tensor:
    """The slice `[start, start + length)` of the file's tensor along its own dimension `dim`."""
    if dim is None:
        return source[:]
    return source[(slice(None),) * dim + (slice(start, start + length),)]


def _spans(head_dim: int, start: int, length: int) -> list[tuple[int, int, int]]:
    """The heads that channels `[start, start + length)` touch: (head, first, end) within each head."""
    stop = start + length
    heads = range(start // head_dim, -(-stop // head_dim))
    return [(h, max(start - h * head_dim, 0), min(stop - h * head_dim, head_dim)) for h in heads]


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
