"""Floor 1: tensors in, tensors out. One public function an op; `backend` chooses who computes it."""

from ssm_dist.kernels.activation import gated_gelu
from ssm_dist.kernels.argmax import largest
from ssm_dist.kernels.attention import paged_attention
from ssm_dist.kernels.convolution import causal_conv, causal_conv_update
from ssm_dist.kernels.last_tokens import load_last, store_last
from ssm_dist.kernels.linear import linear, project_heads
from ssm_dist.kernels.norm import add_rms_norm, rms_normalize
from ssm_dist.kernels.scan import projected_state_update, selective_scan, selective_state_update

__all__ = [
    "add_rms_norm",
    "causal_conv",
    "causal_conv_update",
    "gated_gelu",
    "largest",
    "linear",
    "load_last",
    "paged_attention",
    "project_heads",
    "projected_state_update",
    "rms_normalize",
    "selective_scan",
    "selective_state_update",
    "store_last",
]
