"""Triton kernels of the last tokens and their places: one launch each, where torch takes four and five."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_dist.kernels import backend
from ssm_dist.kernels.dependent_launch import launch_options, start_next, wait_for_inputs
from ssm_dist.kernels.operators import operator

BLOCK = 128
"""Sequences of a program."""


@triton.jit
def _sequences_of_program(slots, sequences, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """BLOCK sequences, which of them there are, and their slots, when inputs can be read."""
    start_next(PDL)
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = s < sequences
    wait_for_inputs(PDL)
    return s, real, tl.load(slots + s, mask=real, other=0)


@triton.jit(
    do_not_specialize=["sequences"],
    do_not_specialize_on_alignment=["last_token", "last_place", "slots"],
)
def _load_kernel(
    last_token, last_place, slots, tokens, places, next_places, narrow, sequences,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK sequences."""
    s, real, slot = _sequences_of_program(slots, sequences, BLOCK, PDL)
    place = tl.load(last_place + slot, mask=real, other=0)
    tl.store(tokens + s, tl.load(last_token + slot, mask=real, other=0), mask=real)
    tl.store(places + s, place, mask=real)
    tl.store(next_places + s, place + 1, mask=real)
    tl.store(narrow + s, slot.to(tl.int32), mask=real)


@triton.jit(
    do_not_specialize=["sequences", "nobody"],
    do_not_specialize_on_alignment=["last_token", "last_place", "slots", "tokens", "places"],
)
def _store_kernel(
    last_token, last_place, slots, tokens, places, sequences, nobody, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """One program: BLOCK sequences."""
    s, real, slot = _sequences_of_program(slots, sequences, BLOCK, PDL)
    place = tl.load(places + s, mask=real, other=0)
    tl.store(last_token + slot, tl.load(tokens + s, mask=real, other=0), mask=real)
    tl.store(last_place + slot, tl.where(slot == nobody, 0, place), mask=real)


def _like_slots(
    last_token: Tensor, last_place: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, places, next_places = (slots.new_empty(slots.shape) for _ in range(3))
    return tokens, places, next_places, slots.new_empty(slots.shape, dtype=torch.int32)


def _nothing(
    last_token: Tensor, last_place: Tensor, slots: Tensor, tokens: Tensor, places: Tensor, nobody: int
) -> None:
    pass


@backend.register("load_last", "triton")
@operator("load_last", fake=_like_slots)
def load_last(last_token: Tensor, last_place: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ssm_dist.kernels.last_tokens.load_last`."""
    _check(last_token, last_place, slots)
    results, sequences = _like_slots(last_token, last_place, slots), len(slots)
    if sequences:
        with torch.cuda.device_of(slots):
            _load_kernel[(triton.cdiv(sequences, BLOCK),)](
                last_token, last_place, slots, *results, sequences,
                BLOCK=BLOCK, num_warps=4, **launch_options(slots.device),
            )  # fmt: skip
    return results


@backend.register("store_last", "triton")
@operator("store_last", mutates=("last_token", "last_place"), fake=_nothing)
def store_last(
    last_token: Tensor, last_place: Tensor, slots: Tensor, tokens: Tensor, places: Tensor, nobody: int
) -> None:
    """`ssm_dist.kernels.last_tokens.store_last`."""
    _check(last_token, last_place, slots, tokens, places)
    if sequences := len(slots):
        with torch.cuda.device_of(slots):
            _store_kernel[(triton.cdiv(sequences, BLOCK),)](
                last_token, last_place, slots, tokens, places, sequences, nobody,
                BLOCK=BLOCK, num_warps=4, **launch_options(slots.device),
            )  # fmt: skip


def _check(*given: Tensor) -> None:
    assert all(t.dtype == torch.int64 and t.is_contiguous() for t in given)
