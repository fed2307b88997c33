"""Root-mean-square normalisations."""

import torch
from torch import Tensor

from ssm_dist.kernels import backend


def add_rms_norm(
    branch: Tensor | None, residual: Tensor | None, weight: Tensor, eps: float,
    appended: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The residual stream and its RMS norm: r = residual + branch, y = r / rms(r) * weight.

    branch: (T, H) in the model's dtype; residual: (T, H) float32; one of them may be None (nothing to add).
    weight: (H,). appended: (T, K), normalised as more columns of r; weight (H + K,), y (T, H + K) then.
    Returns y (T, H) in weight's dtype and r (T, H) in float32 (float64 for float64 inputs).
    """
    return backend.implementation("add_rms_norm")(branch, residual, weight, eps, appended)


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last axis, without a weight (Falcon-Mamba's dt, B and C); in x's dtype."""
    return backend.implementation("rms_normalize")(x, eps)


@backend.register("add_rms_norm", "reference")
def add_rms_norm_reference(
    branch: Tensor | None, residual: Tensor | None, weight: Tensor, eps: float,
    appended: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition of `add_rms_norm` in plain torch."""
    terms = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in (branch, residual) if t is not None]
    total = terms[0] if len(terms) == 1 else terms[0] + terms[1]
    row = total if appended is None else torch.cat([total, appended.to(total.dtype)], -1)
    scale = torch.rsqrt(row.square().mean(-1, keepdim=True) + eps)
    return (row * scale * weight.to(row.dtype)).to(weight.dtype), total


@backend.register("rms_normalize", "reference")
def rms_normalize_reference(x: Tensor, eps: float) -> Tensor:
    """The definition of `rms_normalize` in plain torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
