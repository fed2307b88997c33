"""Causal attention over pages of keys and values, for ragged batches."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_dist.kernels import backend
from ssm_dist.kernels.ragged import sequence_of_token


def paged_attention(
    query: Tensor, key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor,
    seq_offsets: Tensor, positions: Tensor, pages: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """Store the new keys and values in their pages, then attend over everything up to each token.

    query, key, value:      (T, heads, head_dim) of the packed new tokens.
    key_pages, value_pages: (pages, page_size, heads, head_dim), written in place.
    seq_offsets: (S + 1,) int32; positions: (T,) int64, place of each token in its whole sequence, which
    rise by one within it, or are all 0 in a sequence whose output nobody reads;
    pages: (S, P) int32, the page table: token p of sequence s lives in pages[s, p // page_size].
    Returns (T, heads, head_dim). Memory is linear in the context.
    """
    return backend.implementation("paged_attention")(
        query, key, value, key_pages, value_pages, seq_offsets, positions, pages, scale
    )


@backend.register("paged_attention", "reference")
def paged_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor,
    seq_offsets: Tensor, positions: Tensor, pages: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """The definition of `paged_attention` by torch's scaled_dot_product_attention, sequence by sequence."""
    page_size = key_pages.shape[1]
    sequence = sequence_of_token(seq_offsets, query.shape[0])
    where = pages.long()[sequence, positions // page_size] * page_size + positions % page_size
    key_pages.flatten(0, 1)[where] = key.to(key_pages.dtype)
    value_pages.flatten(0, 1)[where] = value.to(value_pages.dtype)
    out = torch.empty_like(query)
    bounds = seq_offsets.tolist()
    for s, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            continue
        context = int(positions[end - 1]) + 1
        used = pages[s, : -(-context // page_size)].long()
        keys, values = (p[used].flatten(0, 1)[:context].to(query.dtype) for p in (key_pages, value_pages))
        out[start:end] = _attend(query[start:end], keys, values, scale)
    return out


def _attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """The last len(query) tokens of a sequence over its keys and values, each (tokens, heads, head_dim)."""
    from torch.nn.attention.bias import causal_lower_right  # loads torch._dynamo, seconds of start-up

    q, k, v = (t.transpose(0, 1)[None] for t in (query, keys, values))
    mask = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[0].transpose(0, 1)
