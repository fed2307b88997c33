"""Where the programs of `decode_layers` hand each other words: by the kernels' own code, without a GPU."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ssm_dist.kernels import decode_layers
from ssm_dist.kernels.decode_layers import Exchange, LayerStack, LayerWeights, RankWords
from ssm_dist.kernels.decode_sizes import FEW, few_sizes, kernel_sizes, programs_of, words_of_ranks
from ssm_dist.registry import preset

STATES, LAYERS = 16, 2


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("name", ["mamba-2.8b", "falcon-mamba-7b", "zamba-7b"])
def test_every_word_that_is_awaited_is_sent_once_to_a_place_of_its_own(
    name: str, degree: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssm_dist.kernels import gluon_layers, gluon_layers_few
    from tests.kernels.playing_layers import Played

    model, whole = preset(name)[1], name != "zamba-7b"
    width, channels = model.d_model, model.d_inner // degree
    layer = weights(width, channels, model.dt_rank)
    given = width, channels, model.dt_rank, STATES, programs_of(width, 132), degree
    few = {most: few_sizes(*given, most) for most in FEW} if whole else {}
    sizes = {1: kernel_sizes(*given), **{most: constants for most, constants in few.items() if constants}}
    assert len(sizes) == (3 if whole else 1)

    shared = [torch.zeros(words_of_ranks(sizes), dtype=torch.int32) for _ in range(degree)]
    addresses, error = tuple(memory.data_ptr() for memory in shared), torch.zeros(4, dtype=torch.int32)
    ranks = [RankWords(rank, addresses, error, limit=1) for rank in range(degree)]
    exchanges = [Exchange(sizes, torch.device("cpu"), words) for words in ranks]
    memories = [*shared, *(place.words for exchange in exchanges for place in exchange.places.values())]
    used = torch.zeros(sum(map(len, memories)), dtype=torch.int64)
    for most in sizes:
        played = Played(gluon_layers.layers_kernel if most == 1 else gluon_layers_few.few_layers_kernel)
        kernels = SimpleNamespace(layers_kernel=played, few_layers_kernel=played)
        monkeypatch.setattr(decode_layers, "_kernels", lambda *_, kernels=kernels: kernels)
        for exchange in exchanges:
            stack = LayerStack(
                [layer] * LAYERS, exchange, 1e-5, rms_eps=1e-6, last_norm=bfloat16(width) if whole else None,
                heads=max(1, model.heads // degree), sharers=max(1, degree // model.heads),
            )  # fmt: skip
            stack.launch(
                bfloat16(most, width), None if whole else float32(1, width), torch.arange(most),
                bfloat16(LAYERS, most, 3, channels), float32(LAYERS, most, channels, STATES),
            )  # fmt: skip
        sent = {tag: times(words, memories) for tag, words in played.sent.items()}
        awaited = {tag: times(words, memories) for tag, words in played.awaited.items()}
        assert sent.keys() == awaited.keys() >= {*range(LAYERS)}
        for tag, here in sent.items():
            assert here.max() == 1, "vectors overlap"
            assert not (awaited[tag] > here).any(), "nobody sends it"
            assert not (here & sent.get(tag + 1, 0)).any(), "somebody may not have read it"
        by_kernel = torch.stack([*sent.values()]).amax(0)
        assert not (used & by_kernel).any(), "kernels overlap"
        used |= by_kernel


def times(addresses: list[Tensor], memories: list[Tensor]) -> Tensor:
    """How often each word of the memories, in the order of their addresses, is among these."""
    every, order = torch.cat(addresses), sorted(memories, key=Tensor.data_ptr)
    begins = torch.tensor([memory.data_ptr() for memory in order])
    sizes = torch.tensor([memory.nbytes for memory in order])
    number = torch.searchsorted(begins, every, right=True) - 1
    at = every - begins[number]
    assert ((at >= 0) & (at < sizes[number])).all(), "outside of the memory"
    return torch.bincount((at + (sizes.cumsum(0) - sizes)[number]) // 4, minlength=int(sizes.sum()) // 4)


def weights(d_model: int, channels: int, dt_rank: int) -> LayerWeights:
    return LayerWeights(
        bfloat16(d_model), bfloat16(2, channels, d_model), bfloat16(channels, 4), bfloat16(channels),
        bfloat16(dt_rank + 2 * STATES, channels), bfloat16(channels, dt_rank), float32(channels),
        float32(channels, STATES), float32(channels), bfloat16(d_model, channels),
    )  # fmt: skip


def bfloat16(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def float32(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")
