"""The last token of every sequence and its place, kept by slot: where a decode step begins and ends."""

import torch
from torch import Tensor

from ssm_dist.kernels import backend


def load_last(last_token: Tensor, last_place: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a decode step of some slots starts from.

    last_token, last_place: (slots,) int64, contiguous. slots: (S,) int64. Returns the tokens (S,) int64,
    their places (S,) int64, the places after them (S,) int64, and the slots in int32.
    """
    return backend.implementation("load_last")(last_token, last_place, slots)


def store_last(
    last_token: Tensor, last_place: Tensor, slots: Tensor, tokens: Tensor, places: Tensor, nobody: int
) -> None:
    """Record new tokens of some slots and their places; slot `nobody` gets place 0.

    last_token, last_place: (slots,) int64, contiguous, updated in place. slots, tokens, places: (S,) int64;
    of the slots, only `nobody` may come several times.
    """
    backend.implementation("store_last")(last_token, last_place, slots, tokens, places, nobody)


@backend.register("load_last", "reference")
def load_last_reference(
    last_token: Tensor, last_place: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition of `load_last` in plain torch."""
    places = last_place[slots]
    return last_token[slots], places, places + 1, slots.int()


@backend.register("store_last", "reference")
def store_last_reference(
    last_token: Tensor, last_place: Tensor, slots: Tensor, tokens: Tensor, places: Tensor, nobody: int
) -> None:
    """The definition of `store_last` in plain torch."""
    last_token.index_put_((slots,), tokens)
    last_place.index_put_((slots,), torch.where(slots == nobody, 0, places))
