"""Linear layers. With few rows they are bound by reading the weight, which wants kernels of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_dist.kernels import backend
from ssm_dist.kernels.operators import operator


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias.

    x: (T, K); rows may be strided. weight: (N, K), or a transposed view. bias: (N,) or None.
    Returns (T, N) in x's dtype, summed in float32 where a kernel of ours serves it: for few rows.
    """
    return backend.implementation("linear")(x, weight, bias)


def project_heads(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """Each head of channels times its part of the weight: x (T, C), weight (C, K) -> (T, heads, K).

    Head h consists of the channels h * C / heads ... (h + 1) * C / heads - 1. For few rows it is fastest
    where the weight is a transposed view, of contiguous (K, C).
    """
    return backend.implementation("project_heads")(x, weight, heads)


def linear_by_head(x: Tensor, weight: Tensor) -> Tensor:
    """Each head of inputs times its part of the weight: x (T, G, K), weight (N, K) -> (T, N).

    Group g makes the outputs g * N / G ... (g + 1) * N / G - 1.
    """
    return linear(x[:, 0], weight) if x.shape[1] == 1 else _side_by_side(x, weight)


def empty_outputs(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What a linear layer fills: (T, N) for x (T, ...) and weight (N, K)."""
    return x.new_empty((x.shape[0], weight.shape[0]))


@operator("linear_by_head", fake=empty_outputs)
def _side_by_side(x: Tensor, weight: Tensor) -> Tensor:
    """Each head's product is written where it belongs: a batched product would have to be copied there."""
    y, heads = empty_outputs(x, weight), x.shape[1]
    with torch.no_grad():  # which writing into a part of a tensor asks for
        for head, (outputs, rows) in enumerate(zip(y.chunk(heads, 1), weight.chunk(heads), strict=True)):
            torch.mm(x[:, head], rows.T, out=outputs)
    return y


@backend.register("project_heads", "reference")
def project_heads_reference(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """The definition of `project_heads` in plain torch, but for the linear layer that one head is."""
    if heads == 1:
        return linear(x, weight.T)[:, None]
    return torch.einsum("tgc,gcr->tgr", x.unflatten(1, (heads, -1)), weight.unflatten(0, (heads, -1)))


@backend.register("linear", "reference")
def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition of `linear` in plain torch."""
    return F.linear(x, weight, bias)
