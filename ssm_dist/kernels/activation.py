"""Gated activations."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_dist.kernels import backend


def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, with the GELU of the error function (arXiv 1606.08415); rows may be strided.

    gate, up: (T, n) of one dtype. Returns (T, n) in it; everything between is float32 (float64 for float64).
    """
    return backend.implementation("gated_gelu")(gate, up)


@backend.register("gated_gelu", "reference")
def gated_gelu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition of `gated_gelu` in plain torch."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.gelu(gate.to(wide)) * up.to(wide)).to(gate.dtype)
