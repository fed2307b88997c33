"""Layers of a Mamba or hybrid model as one operator, for decode steps of a few sequences on a Hopper GPU.

`gluon_layers` has the kernel for one sequence, `gluon_layers_few` that for up to eight, `decode_sizes` their
constants. Here: which models they serve, the table of their parameters, and the memory in which their
programs hand vectors to each other.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ssm_dist.kernels import tuning
from ssm_dist.kernels.decode_sizes import (
    FEW,
    Sizes,
    few_sizes,
    kernel_sizes,
    programs_of,
    words_of_ranks,
    words_within,
)
from ssm_dist.kernels.gluon_layers_form import CHANNELS, FIELDS, X_WORDS
from ssm_dist.kernels.operators import operator

SMALLEST = 512
"""d_model of the models that it serves."""

UNBOUNDED = 2**61
"""Nanoseconds: a rank alone waits for nobody who could be gone. The kernel doubles it."""


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """The parameters of one layer that a rank holds: D channels of d_inner, H = d_model, R = dt_rank."""

    norm: Tensor
    """(H,) bfloat16."""
    in_proj: Tensor
    """(2, D, H) bfloat16: x, then z."""
    taps: Tensor
    """(D, 4) bfloat16."""
    conv_bias: Tensor
    """(D,) bfloat16."""
    x_proj: Tensor
    """(R + 2 N, D) bfloat16: dt, B, C."""
    dt_proj: Tensor
    """(D, R) bfloat16."""
    dt_bias: Tensor
    """(D,) float32."""
    A_log: Tensor
    """(D, N) float32."""
    skip: Tensor
    """(D,) float32; D of the Mamba paper."""
    out_proj: Tensor
    """(H, D) bfloat16."""

    def all(self) -> list[Tensor]:
        """In the order of the kernel's table."""
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(frozen=True, eq=False)
class RankWords:
    """Memory of all ranks for the vectors that they send each other."""

    rank: int
    addresses: tuple[int, ...]
    """Of each rank's `words_of_ranks` words, which begin as zeros."""
    error: Tensor
    """What `triton_remote.error_words` made."""
    limit: int
    """Nanoseconds that a wait may take."""
    keep: Any = None
    """What keeps the memory alive."""


def reason_against(layer: LayerWeights, heads: int, device: torch.device) -> str | None:
    """Why the kernel cannot serve a model of such layers, with so many heads on a rank; None where it can."""
    if device.type != "cuda" or _kernels("gluon_layers", device) is None:
        return "that kernel is for Hopper GPUs and Triton 3.6 to 3.9"
    (d_model, channels), (rank, states) = layer.out_proj.shape, (layer.dt_proj.shape[1], layer.A_log.shape[1])
    wide = {"dt_bias", "A_log", "skip"}
    expected = [torch.float32 if field.name in wide else torch.bfloat16 for field in fields(layer)]
    if [t.dtype for t in layer.all()] != expected:
        return "its weights are not bfloat16, or A, D and the bias of dt not float32"
    if any(not t.is_contiguous() or t.data_ptr() % 16 for t in layer.all()):
        return "its weights are not contiguous in memory"
    if layer.taps.shape[1] != 4 or states != 16:
        return "its convolution is not 4 wide or its states are not 16 a channel"
    if d_model % 32 or channels % 32 or rank % 8 or rank > 256:
        return "its sizes are no multiples of 32, or dt_rank none of 8 up to 256"
    if d_model < SMALLEST:
        return f"with d_model below {SMALLEST} it has not been tried"
    programs = programs_of(d_model, tuning.multiprocessors(device))
    own = -(-channels // programs)
    if max(own, -(-d_model // programs)) > CHANNELS:
        return "there are too many channels, or columns, for this GPU"
    if programs % heads or (heads > 1 and own * (programs // heads) * heads != channels):
        return "its heads do not begin where a program's channels do"
    if heads * (rank + 2 * states) > X_WORDS:
        return "x_proj has too many outputs"
    return None


def sizes_of(layer: LayerWeights, ranks: int, *, few: bool) -> Sizes:
    """The kernels for such layers, whose `reason_against` is None; few: also those for a few sequences.

    These take layers that are a whole model, with x_proj's outputs for all channels, where they fit.
    """
    d_model, channels = layer.out_proj.shape
    programs = programs_of(d_model, tuning.multiprocessors(layer.norm.device))
    given = d_model, channels, layer.dt_proj.shape[1], layer.A_log.shape[1], programs, ranks
    found = {most: few_sizes(*given, most) for most in FEW} if few else {}
    return {1: kernel_sizes(*given), **{most: constants for most, constants in found.items() if constants}}


@dataclass(frozen=True, eq=False)
class _Place:
    """Where the programs of one kernel hand each other vectors; its tags are its own."""

    words: Tensor
    """Within this GPU."""
    counters: Tensor
    """(programs,) vectors so far and one: the tag 0 would be that of words without any."""
    begin: int
    """Bytes from the beginning of each rank's memory."""


class Exchange:
    """What the programs of a rank hand each other vectors in: for all stacks of a model, one at a time."""

    def __init__(self, sizes: Sizes, device: torch.device, ranks: RankWords | None = None) -> None:
        """sizes: what `sizes_of` gave; ranks: with `words_of_ranks` words each, None for one rank alone."""
        self.sizes = sizes
        self.ranks = _alone(words_of_ranks(sizes), device) if ranks is None else ranks
        self.places: dict[int, _Place] = {}
        begin = 0
        for most, constants in sizes.items():
            words = torch.zeros(words_within(constants), dtype=torch.int32, device=device)
            counters = torch.ones(constants["P"], dtype=torch.int32, device=device)
            self.places[most] = _Place(words, counters, 4 * begin)
            begin += words_of_ranks({most: constants})


class LayerStack:
    """Layers that follow each other on one rank, and all that their kernels need besides states."""

    def __init__(
        self, layers: Sequence[LayerWeights], exchange: Exchange, eps: float, *,
        rms_eps: float | None, last_norm: Tensor | None, heads: int, sharers: int,
    ) -> None:  # fmt: skip
        """For layers that `reason_against` finds nothing against; it keeps their weights where they are now.

        last_norm: (H,) bfloat16, of the norm after them; None for none. rms_eps: as in
        `projected_state_update`; heads: that this rank has, or has a part of; sharers: neighbouring ranks
        that have parts of the same heads.
        """
        first, device = layers[0], layers[0].norm.device
        self.name = f"layers {next(_numbers)}"
        self.layers, self._exchange, self._last_norm = list(layers), exchange, last_norm
        self.sizes = exchange.sizes
        self.sequences = max(self.sizes)
        """That a step may have."""
        self._eps, self._rms_eps, self._heads, self._sharers = eps, rms_eps, heads, sharers
        self._anchor = first.in_proj.view(torch.int32)
        places = [[self._distance(t) for t in layer.all()] for layer in layers]
        places.append([0 if last_norm is None else self._distance(last_norm)])
        rows = [row + [0] * (FIELDS - len(row)) for row in places]
        self._table = torch.tensor(rows, dtype=torch.int64, device=device)
        _stacks[self.name] = self

    def step(
        self, hidden: Tensor, residual: Tensor | None, slots: Tensor, conv: Tensor, ssm: Tensor
    ) -> Tensor:
        """Advance the states by a token; returns the last norm of the residual stream, or the stream itself.

        hidden, (n, H) bfloat16 with n up to `sequences`: the residual stream; or with a residual, (1, H)
        float32, the normed input of the first layer. slots: (n,) int32; conv: (layers, slots, 3, D) bfloat16;
        ssm: (layers, slots, D, N) float32 or bfloat16. Both are updated in place. All ranks call it alike.
        Returns (n, H), bfloat16 if normed, else float32.
        """
        result: Tensor = decode_layers(hidden, residual, slots, conv, ssm, self.name)
        return result

    def result_like(self, hidden: Tensor) -> Tensor:
        """A tensor for what `step` returns."""
        return hidden.new_empty(hidden.shape, dtype=torch.float32 if self._last_norm is None else None)

    def launch(
        self, hidden: Tensor, residual: Tensor | None, slots: Tensor, conv: Tensor, ssm: Tensor
    ) -> Tensor:
        """`step`, not as an operator."""
        count = hidden.shape[0]
        assert hidden.is_contiguous() and conv.is_contiguous() and ssm.is_contiguous()
        assert conv.dtype == torch.bfloat16 and len(conv) == len(ssm) == len(self.layers)
        most = min(most for most in self.sizes if most >= count)
        y, place, ranks = self.result_like(hidden), self._exchange.places[most], self._exchange.ranks
        addresses = tuple(address + place.begin for address in ranks.addresses)
        given = {
            "anchor": self._anchor, "table": self._table, "hidden": hidden, "slots": slots, "y": y,
            "conv": conv, "ssm": ssm, "counters": place.counters, "words": place.words.data_ptr(),
            "shared": addresses[ranks.rank], "peers": addresses, "rank": ranks.rank,
            "error": ranks.error.data_ptr(), "limit": ranks.limit, "layers": len(self.layers),
            "eps": self._eps, "rms_eps": self._rms_eps or 0.0,
            **dict(zip(("conv_layer", "conv_slot", "conv_row"), conv.stride(), strict=False)),
            **dict(zip(("ssm_layer", "ssm_slot"), ssm.stride(), strict=False)),
            "RMS": self._rms_eps is not None, **self.sizes[most],
            "num_warps": 8, "enable_fp_fusion": True, "launch_cooperative_grid": True,
        }  # fmt: skip
        grid = (len(place.counters),)
        with torch.cuda.device_of(hidden):
            if most > 1:
                assert residual is None and self._last_norm is not None
                kernels = _kernels("gluon_layers_few", hidden.device)
                assert kernels is not None
                kernels.few_layers_kernel[grid](count=count, **given)
            else:
                assert residual is None or (residual.dtype == torch.float32 and residual.is_contiguous())
                kernels = _kernels("gluon_layers", hidden.device)
                assert kernels is not None
                first = ranks.rank // self._sharers * self._sharers
                kernels.layers_kernel[grid](
                    residual=residual, sharers=addresses[first:][: self._sharers], x_rank=ranks.rank - first,
                    HEADS=self._heads, SHARERS=self._sharers, NORMED=self._last_norm is not None, **given,
                )  # fmt: skip
        return y

    def _distance(self, parameter: Tensor) -> int:
        return (parameter.data_ptr() - self._anchor.data_ptr()) // 4


def _kernels(name: str, device: torch.device) -> ModuleType | None:
    from ssm_dist.kernels.gluon_support import gluon_module  # a CPU needs no Triton

    return gluon_module(name, device)


def _alone(words: int, device: torch.device) -> RankWords:
    from ssm_dist.kernels.triton_remote import error_words  # a CPU needs no Triton

    memory = torch.zeros(words, dtype=torch.int32, device=device)
    nobody_reads = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    return RankWords(
        0, (memory.data_ptr(),), error_words(nobody_reads, device), UNBOUNDED, (memory, nobody_reads)
    )


def _like_result(
    hidden: Tensor, residual: Tensor | None, slots: Tensor, conv: Tensor, ssm: Tensor, stack: str
) -> Tensor:
    return _stacks[stack].result_like(hidden)


@operator("decode_layers", mutates=("conv", "ssm"), fake=_like_result)
def decode_layers(
    hidden: Tensor, residual: Tensor | None, slots: Tensor, conv: Tensor, ssm: Tensor, stack: str
) -> Tensor:
    """`LayerStack.step` of the stack of that name."""
    return _stacks[stack].launch(hidden, residual, slots, conv, ssm)


_numbers = itertools.count()
_stacks: weakref.WeakValueDictionary[str, LayerStack] = weakref.WeakValueDictionary()
