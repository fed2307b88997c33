"""Small modules of nobody's library, written as people write them, for the tests of plans."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Packed(nn.Module):
    """x and z from one linear, as two blocks of rows or as pairs, gated and projected back."""

    def __init__(self, pairs: bool, width: int = 6, channels: int = 12) -> None:
        super().__init__()
        self.pairs = pairs
        self.into = nn.Linear(width, 2 * channels)
        self.out = nn.Linear(channels, width)

    def forward(self, hidden: Tensor) -> Tensor:
        both: Tensor = self.into(hidden)
        x, z = both.unflatten(-1, (-1, 2)).unbind(-1) if self.pairs else both.chunk(2, dim=-1)
        output: Tensor = self.out(x * torch.sigmoid(z))
        return output


class MambaSSMMixer(nn.Module):
    """As mamba-ssm's Mamba reads its sizes: a fused path without reductions, a cache of d_model * expand."""

    def __init__(self, d_model: int, expand: int, d_state: int, dt_rank: int) -> None:
        super().__init__()
        self.d_model, self.expand, self.d_state, self.dt_rank = d_model, expand, d_state, dt_rank
        self.d_inner, self.d_conv = expand * d_model, 4
        self.use_fast_path = True
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, self.d_conv, groups=self.d_inner, padding=3)
        self.x_proj = nn.Linear(self.d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.zeros(self.d_inner, d_state))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        state = torch.zeros(batch, self.d_model * self.expand, self.d_state)
        xz = (self.in_proj.weight @ hidden.flatten(0, 1).T).unflatten(1, (batch, length)).transpose(0, 1)
        x, z = xz.chunk(2, dim=1)
        x = F.silu(self.conv1d(x)[..., :length])
        flat = x.transpose(1, 2)
        mixed = F.linear(flat, self.x_proj.weight) if self.use_fast_path else self.x_proj(flat)
        dt, B, C = mixed.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = F.softplus(self.dt_proj(dt))
        A, outputs = -self.A_log.exp(), []
        for t in range(length):
            state = state * (dt[:, t, :, None] * A).exp() + (dt[:, t] * flat[:, t])[..., None] * B[:, t, None]
            outputs.append((state * C[:, t, None]).sum(-1) + self.D * flat[:, t])
        output: Tensor = self.out_proj(torch.stack(outputs, dim=1) * F.silu(z.transpose(1, 2)))
        return output


class _GatedMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.fc1(x).chunk(2, dim=-1)
        output: Tensor = self.fc2(y * F.silu(gate))
        return output


class _Block(nn.Module):
    def __init__(self, width: int, mlp: int) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(width), MambaSSMMixer(width, expand=2, d_state=5, dt_rank=3)
        self.mlp = None
        if mlp:
            self.norm2, self.mlp = nn.LayerNorm(width), _GatedMLP(width, mlp)

    def forward(self, hidden: Tensor) -> Tensor:
        mixed: Tensor = hidden + self.mixer(self.norm(hidden))
        return mixed if self.mlp is None else mixed + self.mlp(self.norm2(mixed))


class MambaLMHeadModel(nn.Module):
    """The module tree of mamba-ssm's class of this name, of which it also bears the address."""

    def __init__(self, width: int = 12, layers: int = 2, vocabulary: int = 29, mlp: int = 0) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.embedding = nn.Embedding(vocabulary, width)
        self.backbone.layers = nn.ModuleList(_Block(width, mlp) for _ in range(layers))
        self.backbone.norm_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.backbone.embedding.weight

    def forward(self, tokens: Tensor) -> Any:
        hidden = self.backbone.embedding(tokens)
        for layer in self.backbone.layers:
            hidden = layer(hidden)
        return SimpleNamespace(logits=self.lm_head(self.backbone.norm_f(hidden)))


MambaLMHeadModel.__module__ = "mamba_ssm.models.mixer_seq_simple"
