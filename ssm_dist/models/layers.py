"""Layers that the models share. The sizes come from the parameters held, so a shard is a smaller layer."""

import torch
from torch import Tensor, nn

from ssm_dist import kernels


class AddRMSNorm(nn.Module):
    """The seam between layers: adds a branch to the residual stream and normalises the sum.

    Tensor-parallel plans replace this forward by one that also reduces the branch over the ranks.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(
        self, branch: Tensor | None, residual: Tensor | None, appended: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `kernels.add_rms_norm`: (T, H) each, one may be None; returns (normed, new residual).

        With columns appended to the stream, (T, K), `width` counts them, and the new residual is whole.
        """
        return kernels.add_rms_norm(branch, residual, self.weight, self.eps, appended)


class Linear(nn.Linear):
    """torch's linear layer, computed by `kernels.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(T, in_features) -> (T, out_features)."""
        return kernels.linear(input, self.weight, self.bias)


class PackedLinear(nn.Module):
    """Two projections of one input held as one parameter (2, d_out, d_in), computed by one GEMM."""

    def __init__(self, d_in: int, d_out: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, d_out, d_in))
        self.bias = nn.Parameter(torch.empty(2, d_out)) if bias else None

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (T, d_in) -> the two outputs (T, d_out), views of one packed result."""
        bias = None if self.bias is None else self.bias.flatten()
        first, second = kernels.linear(hidden, self.weight.flatten(0, 1), bias).chunk(2, dim=-1)
        return first, second
