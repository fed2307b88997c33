"""Two-shot over the process group, with a codec: for gloo, and for NCCL where ranks share no memory.

Every rank owns a stripe of the rows. All encode their rows and send each stripe to its owner; the owner
decodes them, but for its own part, which it has, sums in float32 in rank order, and encodes the sum; all
gather the encoded sums and decode them, the owner its own, too. So all ranks decode the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssm_dist.kernels import add_rms_norm
from ssm_dist.kernels.codecs import (
    decode_rows,
    decoded_sum,
    encode_rows,
    encode_rows_with_feedback,
    sum_rows,
    sum_rows_with_feedback,
)
from ssm_dist.parallel.collectives.failures import Call, wait
from ssm_dist.parallel.collectives.gather import all_gather

Errors = tuple[Tensor, Tensor]
"""What a sum with error feedback leaves to the next: of this rank's part (T, H), and of the sums of the rows
that it owns (ceil(T / ranks), H), of which those past T are undefined."""


def all_reduce(x: Tensor, call: Call, in_place: bool = False) -> Tensor:
    """The process group's own sum, in a fresh tensor or in x itself, which is contiguous then."""
    total = x if in_place else x.clone(memory_format=torch.contiguous_format)
    if call.group.backend == "nccl":
        dist.all_reduce(total, group=call.group.handle)
    else:
        wait(dist.all_reduce(total, group=call.group.handle, async_op=True), call)
    return total


def exchange(x: Tensor, call: Call, codec: str, group_size: int) -> Tensor:
    """The sum of every rank's x (rows, width), with both trips encoded; of x's dtype."""
    rows, width = x.shape
    parts, own = _parts(x, call, codec, group_size), _own_rows(x, call)
    mine = sum_rows(parts, width, x.dtype, codec, group_size, own, call.group.rank)
    return decode_rows(_gathered(mine, call)[:rows], width, x.dtype, codec, group_size)


def exchange_with_feedback(
    x: Tensor, errors: Errors | None, call: Call, codec: str, group_size: int
) -> tuple[Tensor, Errors]:
    """`exchange`, with error feedback on both trips: the sum, and the errors to give to the next call.

    errors: what the call before returned, or None. See `ssm_dist.kernels.codecs`.
    """
    rows, width = x.shape
    part_error, sum_error = errors or (None, None)
    sent, of_part = encode_rows_with_feedback(x, part_error, codec, group_size, _in_stripes(rows, call))
    parts = _to_owners(sent, call)
    own, rank = _own_rows(x, call), call.group.rank
    of_part[rank * len(own) : (rank + 1) * len(own)] = 0  # these rows are not encoded on their way
    mine, of_sum = sum_rows_with_feedback(parts, sum_error, width, x.dtype, codec, group_size, own, rank)
    total = decode_rows(_gathered(mine, call)[:rows], width, x.dtype, codec, group_size)
    return total, (of_part, of_sum)


def exchange_add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, call: Call, codec: str, group_size: int
) -> tuple[Tensor, Tensor]:
    """As `triton_bulk.bulk_sum_add_rms_norm`: owners add their rows of the residual, and send the norm."""
    rows, width = x.shape
    parts, rank = _parts(x, call, codec, group_size), call.group.rank
    total = decoded_sum(parts, width, x.dtype, codec, group_size, _own_rows(x, call), rank)
    if residual is not None and len(residual) == rows:
        residual = _own_rows(residual, call)
    normed, stream = add_rms_norm(total, residual, weight, eps)
    gathered = _gathered(encode_rows(normed, codec, group_size, len(total)), call)
    return decode_rows(gathered[:rows], width, weight.dtype, codec, group_size), stream


def _parts(x: Tensor, call: Call, codec: str, group_size: int) -> Tensor:
    """What every rank sends of this rank's stripe: (ranks, stripe, bytes)."""
    return _to_owners(encode_rows(x, codec, group_size, _in_stripes(x.shape[0], call)), call)


def _own_rows(x: Tensor, call: Call) -> Tensor:
    """Those of x (rows, width) that this rank owns: (stripe, width), zeros past the end."""
    stripe = _in_stripes(len(x), call) // call.group.size
    own = x[call.group.rank * stripe :][:stripe]
    return torch.nn.functional.pad(own, (0, 0, 0, stripe - len(own)))


def _in_stripes(rows: int, call: Call) -> int:
    """Rows of all stripes, which are as long as each other."""
    return call.group.size * -(-rows // call.group.size)


def _to_owners(sent: Tensor, call: Call) -> Tensor:
    """Encoded rows, a stripe for every rank -> what every rank sends of this rank's stripe."""
    received = _moved(dist.all_to_all_single, torch.empty_like(sent), sent, call)
    return received.unflatten(0, (call.group.size, -1))


def _gathered(mine: Tensor, call: Call) -> Tensor:
    """Every rank's encoded stripe, one after the other."""
    everything = mine.new_empty((call.group.size * len(mine), mine.shape[1]))
    return _moved(all_gather, everything, mine, call)


def _moved(collective: Callable[..., Any], output: Tensor, given: Tensor, call: Call) -> Tensor:
    if call.group.backend == "nccl":
        collective(output, given, group=call.group.handle)
    else:
        wait(collective(output, given, group=call.group.handle, async_op=True), call)
    return output
