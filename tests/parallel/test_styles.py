"""Each style on a small module of its own: sharded equals unsharded, on every rank."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ssm_dist.models.layers import AddRMSNorm, PackedLinear
from ssm_dist.models.mixer import HeadwiseExpansion, HeadwiseProjection
from ssm_dist.parallel import (
    Colwise,
    HeadwiseReduce,
    PackedColwise,
    Plan,
    ReduceAddNorm,
    Rowwise,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from tests.parallel.on_ranks import random_module, sharded_output
from tests.ranks import run_on_ranks

each_degree = pytest.mark.parametrize("degree", [1, 2, 4])


class Gated(nn.Module):
    """A packed projection into channels, and one out of them, before a norm that adds."""

    def __init__(self, width: int, channels: int, bias: bool) -> None:
        super().__init__()
        self.into = PackedLinear(width, channels, bias)
        self.out = nn.Linear(channels, width, bias=bias)
        self.norm = AddRMSNorm(width, 1e-5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.into(x)
        normed: tuple[Tensor, Tensor] = self.norm(self.out(first * torch.tanh(second)), x)
        return normed


class Appended(nn.Module):
    """Two linears before a norm of the stream and some more columns."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.into = nn.Linear(width, channels)
        self.out = nn.Linear(channels, width)
        self.norm = AddRMSNorm(width + 3, 1e-5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        normed: tuple[Tensor, Tensor] = self.norm(self.out(torch.tanh(self.into(x))), x, x[:, :3])
        return normed


class Heads(nn.Module):
    """From whole channels into those held, through x_proj and dt_proj: each head's own skinny pair."""

    def __init__(self, width: int, channels: int, heads: int) -> None:
        super().__init__()
        self.into = nn.Linear(width, channels, bias=False)
        self.x_proj = HeadwiseProjection(channels, 5, heads)
        self.dt_proj = HeadwiseExpansion(channels, 5)
        self.out = nn.Linear(channels, width, bias=False)
        self.norm = AddRMSNorm(width, 1e-5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        expanded = self.dt_proj(torch.tanh(self.x_proj(self.into(x))))
        normed: tuple[Tensor, Tensor] = self.norm(self.out(expanded), x)
        return normed


class Words(nn.Module):
    """Embedding and head, each with its own weights."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.embedding(tokens)
        return embedded, self.head(embedded)


def check(build: Any, sizes: tuple[Any, ...], plan: Plan, degree: int, *inputs: Tensor) -> list[Any]:
    """Every rank's output equals that of the whole module; the same bits on all ranks."""
    with torch.inference_mode():
        expected = random_module(build, *sizes)(*inputs)
    outputs = run_on_ranks(degree, sharded_output, build, sizes, plan, *inputs)
    for output in outputs:
        assert_close(output, expected)
        assert_close(output, outputs[0], rtol=0, atol=0)
    return outputs


@each_degree
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_packed_columns_then_rows_then_the_reducing_norm(bias: bool, degree: int) -> None:
    plan = {"into": PackedColwise(), "out": Rowwise(), "norm": ReduceAddNorm()}
    check(Gated, (7, 12, bias), plan, degree, torch.randn(3, 7))


@each_degree
def test_columns_then_rows_then_the_reducing_norm_of_more_columns(degree: int) -> None:
    """The bias after the split inputs counts once, not once a rank."""
    plan = {"into": Colwise(), "out": Rowwise(), "norm": ReduceAddNorm()}
    check(Appended, (7, 12), plan, degree, torch.randn(3, 7))


@each_degree
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_heads_reduce_among_the_ranks_that_share_them(heads: int, degree: int) -> None:
    plan: Plan = {
        "into": Colwise(),
        "x_proj": HeadwiseReduce(),
        "dt_proj": Colwise(),
        "out": Rowwise(),
        "norm": ReduceAddNorm(),
    }
    check(Heads, (7, 16, heads), plan, degree, torch.randn(3, 7))


@each_degree
def test_the_vocabulary_is_looked_up_exactly_and_gathered_in_order(degree: int) -> None:
    tokens = torch.tensor([0, 11, 5, 6, 5, 3])
    plan = {"embedding": VocabParallelEmbedding(), "head": VocabParallelHead()}
    whole = random_module(Words, 12, 7)
    for embedded, logits in check(Words, (12, 7), plan, degree, tokens):
        assert torch.equal(embedded, whole.embedding.weight[tokens])
        assert logits.shape == (6, 12)
