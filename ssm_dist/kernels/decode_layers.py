"""Layers of a Mamba or hybrid model as one operator, for decode steps of one sequence on a Hopper GPU.

`gluon_layers` has the kernel. Here: which models it serves, the table of their parameters, and the memory in
which its programs hand vectors to each other.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ssm_dist.kernels.gluon_layers_form import (
    CHANNELS,
    FIELDS,
    PRODUCT_BYTES,
    ROUND,
    SCRATCH_BYTES,
    VECTOR,
    WARPS,
    X_WORDS,
    piece_bytes,
)
from ssm_dist.kernels.operators import operator

ARENA_BYTES = 222 * 1024
"""Shared memory of a program, but for what the compiler needs."""

IN_FLIGHT = {False: 60_000, True: 50_000}
"""Bytes that a multiprocessor asks for ahead, alone and with other ranks (H200)."""

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
    if device.type != "cuda" or _kernel_module(device) is None:
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
    programs = programs_of(d_model, _multiprocessors(device))
    own = -(-channels // programs)
    if max(own, -(-d_model // programs)) > CHANNELS:
        return "there are too many channels, or columns, for this GPU"
    if programs % heads or (heads > 1 and own * (programs // heads) * heads != channels):
        return "its heads do not begin where a program's channels do"
    if heads * (rank + 2 * states) > X_WORDS:
        return "x_proj has too many outputs"
    return None


def programs_of(d_model: int, multiprocessors: int) -> int:
    """At most one a multiprocessor; each has outputs of out_proj."""
    return math.ceil(d_model / math.ceil(d_model / multiprocessors))


def words_of_ranks(ranks: int, d_model: int) -> int:
    """Words, of 4 bytes, that a rank's memory has for what all ranks send it."""
    return 2 * ranks * (X_WORDS + _up(d_model, VECTOR))


def kernel_sizes(
    d_model: int, channels: int, dt_rank: int, states: int, programs: int, ranks: int
) -> dict[str, int]:
    """The kernel's constants that follow from sizes, for so many channels on a rank.

    CHUNKS: of 256 numbers in a part of a row that is fetched at once, so that what the last part lacks is
    within the zeros of a round of threads; SLOTS: pieces of the ring; BEFORE_X: turns of z before x_proj,
    while its input is on its way; AHEAD: pieces in flight.
    """
    widths = d_model, channels
    fitting = [c for c in range(3, 9) if all(_up(w, 256 * c) <= _up(w, ROUND) for w in widths)]
    chunks = min(fitting, key=lambda c: (sum(_up(w, 256 * c) for w in widths), -c))
    piece = piece_bytes(chunks)
    others = 2 * max(_up(w, VECTOR) for w in widths) + SCRATCH_BYTES + PRODUCT_BYTES
    turns = math.ceil(math.ceil(channels / programs) / WARPS)
    return {
        "P": programs, "H": d_model, "D": channels, "R": dt_rank, "N": states,
        "RANKS": ranks, "CHUNKS": chunks, "SLOTS": (ARENA_BYTES - others) // piece,
        "BEFORE_X": min(2, turns - 1), "AHEAD": max(2, round(IN_FLIGHT[ranks > 1] / piece)),
    }  # fmt: skip


class Exchange:
    """What the programs of a rank hand each other vectors in: for all stacks of a model, one at a time."""

    def __init__(
        self, d_model: int, channels: int, device: torch.device, ranks: RankWords | None = None
    ) -> None:
        """channels: of a layer on this rank; ranks: None for one alone."""
        self.programs = programs_of(d_model, _multiprocessors(device))
        self.ranks = _alone(words_of_ranks(1, d_model), device) if ranks is None else ranks
        self.words = torch.zeros(4 * _up(channels, VECTOR), dtype=torch.int32, device=device)
        self.counters = torch.ones(self.programs, dtype=torch.int32, device=device)
        """Layers so far and one: the tag 0 would be that of words without any."""


class LayerStack:
    """Layers that follow each other on one rank, and all that their kernel needs besides states."""

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
        self._eps, self._rms_eps, self._heads = eps, rms_eps, heads
        ranks = exchange.ranks
        self._sharers = ranks.addresses[ranks.rank // sharers * sharers :][:sharers]
        self._anchor = first.in_proj.view(torch.int32)
        places = [[self._distance(t) for t in layer.all()] for layer in layers]
        places.append([0 if last_norm is None else self._distance(last_norm)])
        rows = [row + [0] * (FIELDS - len(row)) for row in places]
        self._table = torch.tensor(rows, dtype=torch.int64, device=device)
        (d_model, channels), dt_rank = first.out_proj.shape, first.dt_proj.shape[1]
        self.constants = kernel_sizes(
            d_model, channels, dt_rank, first.A_log.shape[1], exchange.programs, len(ranks.addresses)
        )  # fmt: skip
        _stacks[self.name] = self

    def step(
        self, hidden: Tensor, residual: Tensor | None, slots: Tensor, conv: Tensor, ssm: Tensor
    ) -> Tensor:
        """Advance the states by a token; returns the last norm of the residual stream, or the stream itself.

        hidden, (1, H) bfloat16: the residual stream; or with a residual, (1, H) float32, the normed input of
        the first layer. slots: (1,) int32; conv: (layers, slots, 3, D) bfloat16; ssm: (layers, slots, D, N)
        float32 or bfloat16. Both are updated in place. All ranks call it alike. Returns (1, H), bfloat16 if
        normed, else float32.
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
        gluon_layers = _kernel_module(hidden.device)
        assert gluon_layers is not None and hidden.shape[0] == 1 and hidden.is_contiguous()
        assert residual is None or (residual.dtype == torch.float32 and residual.is_contiguous())
        assert conv.dtype == torch.bfloat16 and len(conv) == len(ssm) == len(self.layers)
        assert conv.is_contiguous() and ssm.is_contiguous()
        y, exchange, ranks = self.result_like(hidden), self._exchange, self._exchange.ranks
        with torch.cuda.device_of(hidden):
            gluon_layers.layers_kernel[(exchange.programs,)](
                self._anchor, self._table, hidden, residual, slots, exchange.counters, y, conv, ssm,
                exchange.words.data_ptr(), ranks.addresses[ranks.rank], ranks.addresses, ranks.rank,
                self._sharers, ranks.rank % len(self._sharers), ranks.error.data_ptr(), ranks.limit,
                len(self.layers), self._eps, self._rms_eps or 0.0,
                *conv.stride()[:3], *ssm.stride()[:2],
                HEADS=self._heads, SHARERS=len(self._sharers), RMS=self._rms_eps is not None,
                NORMED=self._last_norm is not None, **self.constants,
                num_warps=8, enable_fp_fusion=True, launch_cooperative_grid=True,
            )  # fmt: skip
        return y

    def _distance(self, parameter: Tensor) -> int:
        return (parameter.data_ptr() - self._anchor.data_ptr()) // 4


def _kernel_module(device: torch.device) -> ModuleType | None:
    from ssm_dist.kernels.gluon_support import gluon_module  # a CPU needs no Triton

    return gluon_module("gluon_layers", device)


def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _up(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


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
