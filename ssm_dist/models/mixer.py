"""The Mamba-1 mixer, shared by all models (arXiv 2312.00752; heads as in Zamba, arXiv 2405.16712).

Channels are grouped into heads, contiguous blocks of them; one head is the ordinary Mamba. x_proj and dt_proj
work within a head. Everything but x_proj treats the channels independently, so a rank that holds a contiguous
range of channels runs this same code on it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssm_dist import kernels
from ssm_dist.kernels.decode_layers import LayerWeights
from ssm_dist.kernels.linear import linear_by_head
from ssm_dist.models.batch import MixerState, RaggedBatch
from ssm_dist.models.layers import Linear, PackedLinear


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """Sizes of one mixer; the names of the Mamba paper."""

    d_model: int
    d_inner: int
    dt_rank: int
    d_state: int = 16
    conv_width: int = 4
    heads: int = 1
    use_bias: bool = False
    use_conv_bias: bool = True
    mixer_rms_eps: float | None = None
    """Epsilon of the weightless RMS normalisation of dt, B and C (Falcon-Mamba); None for none."""


class ChannelConv(nn.Module):
    """Parameters of the depthwise convolution: weight (d_inner, conv_width), bias (d_inner,) or None."""

    def __init__(self, channels: int, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, x: Tensor, batch: RaggedBatch, state: Tensor) -> Tensor:
        """silu(conv(x)): x (T, d_inner), continuing from and updating `state` (slots, width - 1, d_inner)."""
        return kernels.causal_conv(x, self.weight, self.bias, state, batch.seq_offsets, batch.slots)


class HeadwiseProjection(nn.Module):
    """x_proj: weight (d_inner, d_out), summed over the channels of each head.

    A rank that holds only part of a head computes a partial sum; plans add the reduction.
    """

    def __init__(self, channels: int, d_out: int, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, d_out))
        self.heads = heads
        self.head_dim = channels // heads

    def forward(self, x: Tensor) -> Tensor:
        """x (T, channels held) -> (T, heads held, d_out); a part of a head counts as one."""
        return kernels.project_heads(x, self.weight, self.heads_held)

    @property
    def heads_held(self) -> int:
        """Heads of which this rank holds channels."""
        return max(1, self.weight.shape[0] // self.head_dim)

    def arrange(self) -> None:
        """Let the weight be a view of (d_out, channels held), which decode steps read fastest."""
        self.weight.data = self.weight.data.T.contiguous().T


class HeadwiseExpansion(nn.Module):
    """dt_proj: weight (d_inner, d_in), each head expanding its own input; the bias is added by the scan."""

    def __init__(self, channels: int, d_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, d_in))
        self.bias = nn.Parameter(torch.empty(channels, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """x (T, heads held, d_in) -> (T, channels held), without the bias."""
        return linear_by_head(x, self.weight)


class MambaMixer(nn.Module):
    """in_proj, convolution, selective scan, gate, out_proj."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.sizes = [config.dt_rank, config.d_state, config.d_state]
        self.mixer_rms_eps = config.mixer_rms_eps
        self.in_proj = PackedLinear(config.d_model, config.d_inner, config.use_bias)
        self.conv = ChannelConv(config.d_inner, config.conv_width, config.use_conv_bias)
        self.x_proj = HeadwiseProjection(config.d_inner, sum(self.sizes), config.heads)
        self.dt_proj = HeadwiseExpansion(config.d_inner, config.dt_rank)
        self.A_log = nn.Parameter(torch.empty(config.d_inner, config.d_state, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(config.d_inner, dtype=torch.float32))
        self.out_proj = Linear(config.d_inner, config.d_model, bias=config.use_bias)

    def forward(self, hidden: Tensor, batch: RaggedBatch, state: MixerState) -> Tensor:
        """hidden (T, d_model), normed -> (T, d_model), the branch; `state` is updated in place."""
        x, z = self.in_proj(hidden)
        mix = self._step if batch.decode else self._scan
        return self.out_proj(mix(x, z, batch, state))

    def with_norm(self, norm: Tensor) -> LayerWeights | None:
        """Its parameters and those of the norm before it, for a `LayerStack`; None where they have others."""
        if self.in_proj.bias is not None or self.out_proj.bias is not None or self.conv.bias is None:
            return None
        weights = (
            norm, self.in_proj.weight, self.conv.weight, self.conv.bias, self.x_proj.weight.T,
            self.dt_proj.weight, self.dt_proj.bias, self.A_log, self.D, self.out_proj.weight,
        )  # fmt: skip
        return LayerWeights(*(weight.detach() for weight in weights))

    def state_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of one sequence: (conv_width - 1, d_inner) of the convolution, (d_inner, d_state) of the scan."""
        channels, width = self.conv.weight.shape
        return (width - 1, channels), (channels, self.A_log.shape[1])

    def _scan(self, x: Tensor, z: Tensor, batch: RaggedBatch, state: MixerState) -> Tensor:
        """From the projections x and z (T, d_inner) of any tokens to the gated output."""
        x = self.conv(x, batch, state.conv)
        dt, B, C = self.x_proj(x).split(self.sizes, dim=-1)
        if self.mixer_rms_eps is not None:
            dt, B, C = (kernels.rms_normalize(t, self.mixer_rms_eps) for t in (dt, B, C))
        return kernels.selective_scan(
            x, self.dt_proj(dt), self.A_log, B, C, self.D, z, self.dt_proj.bias,
            state.ssm, batch.seq_offsets, batch.slots,
        )  # fmt: skip

    def _step(self, x: Tensor, z: Tensor, batch: RaggedBatch, state: MixerState) -> Tensor:
        """The same of one token a sequence."""
        x = kernels.causal_conv_update(x, self.conv.weight, self.conv.bias, state.conv, batch.slots)
        return kernels.projected_state_update(
            x, self.x_proj(x), self.dt_proj.weight, self.A_log, self.D, z, self.dt_proj.bias,
            state.ssm, batch.slots, self.mixer_rms_eps,
        )  # fmt: skip


def arrange_weights(model: nn.Module) -> None:
    """Lay a loaded model's weights out in memory as its decode steps read them; shapes and values stay."""
    for module in model.modules():
        if isinstance(module, HeadwiseProjection):
            module.arrange()
