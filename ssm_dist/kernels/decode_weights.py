"""The parameters of a layer, for the kernels of decode steps that run many layers."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor


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
