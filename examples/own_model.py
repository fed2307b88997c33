"""A model of one's own, with a Mamba mixer and an MLP, sharded by a plan written in 15 lines.

    torchrun --standalone --nproc-per-node 2 examples/own_model.py

The model knows nothing of ranks. `check_plan` tries the plan first, without any.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ssm_dist.parallel import (
    Adjusted,
    ChannelConv,
    Colwise,
    PackedBlocks,
    PaddedVocabEmbedding,
    PaddedVocabHead,
    Plan,
    Replicated,
    RowwiseReduce,
    TensorParallel,
    check_plan,
    shard_module,
)

PLAN: Plan = {
    "embedding": PaddedVocabEmbedding(),
    "layers.*.*_norm": Replicated(),
    "layers.*.mixer": Adjusted({"A_log": 0, "D": 0}, divided=("channels",)),
    "layers.*.mixer.in_proj": PackedBlocks(),
    "layers.*.mixer.conv": ChannelConv(),
    "layers.*.mixer.x_proj": RowwiseReduce("x_proj"),
    "layers.*.mixer.dt_proj": Colwise(),
    "layers.*.mixer.out_proj": RowwiseReduce(),
    "layers.*.mlp.up": Colwise(),
    "layers.*.mlp.down": RowwiseReduce(),
    "head": PaddedVocabHead(),
}


class Mixer(nn.Module):
    """A Mamba mixer, step by step."""

    def __init__(self, width: int, channels: int, states: int, rank: int) -> None:
        super().__init__()
        self.channels, self.sizes = channels, [rank, states, states]
        self.in_proj = nn.Linear(width, 2 * channels, bias=False)
        self.conv = nn.Conv1d(channels, channels, 4, groups=channels, padding=3)
        self.x_proj = nn.Linear(channels, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, channels)
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))
        self.out_proj = nn.Linear(channels, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, length, width) -> the same."""
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        x = F.silu(self.conv(x.mT)[..., : hidden.shape[1]].mT)
        dt, B, C = self.x_proj(x).split(self.sizes, dim=-1)
        dt, A = F.softplus(self.dt_proj(dt)), -self.A_log.exp()
        state, outputs = torch.zeros(len(x), self.channels, self.sizes[1]), []
        for t in range(x.shape[1]):
            state = (dt[:, t, :, None] * A).exp() * state + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
            outputs.append((state * C[:, t, None]).sum(-1) + self.D * x[:, t])
        branch: Tensor = self.out_proj(torch.stack(outputs, dim=1) * F.silu(z))
        return branch


class MLP(nn.Module):
    """Up, GELU, down."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same."""
        output: Tensor = self.down(F.gelu(self.up(x)))
        return output


class Layer(nn.Module):
    """A mixer and an MLP, each after a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = nn.RMSNorm(width), Mixer(width, 2 * width, states=8, rank=3)
        self.mlp_norm, self.mlp = nn.RMSNorm(width), MLP(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) -> the same."""
        x = x + self.mixer(self.mixer_norm(x))
        summed: Tensor = x + self.mlp(self.mlp_norm(x))
        return summed


class Model(nn.Module):
    """A language model of a few layers."""

    def __init__(self, vocabulary: int = 61, width: int = 20, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.Sequential(*(Layer(width) for _ in range(layers)))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) -> logits (batch, length, vocabulary)."""
        logits: Tensor = self.head(self.layers(self.embedding(tokens)))
        return logits


@torch.inference_mode()
def main() -> None:
    """Try the plan, shard the model, and compare."""
    check_plan(Model, PLAN, degree=4)
    tp = TensorParallel.over_all_ranks("cpu")
    torch.manual_seed(0)
    whole = Model()
    model = Model()
    model.load_state_dict(whole.state_dict())
    shard_module(model, tp, PLAN)
    tokens = torch.arange(12).view(2, 6)
    difference = (model(tokens) - whole(tokens)).abs().max()
    if tp.rank == 0:
        print(f"{tp.degree} ranks, the mixer's channels on each: {model.layers[0].mixer.channels}")
        print(f"greatest difference from the whole model: {difference:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
