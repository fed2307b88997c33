"""Which form of the Gluon scan is taken, where no GPU is needed to say so."""

import pytest

from ssm_dist.kernels.gluon_form import choose


@pytest.mark.parametrize(
    ("sequences", "tokens", "channels"), [(8, 8192, 8192), (8, 2048, 5120), (64, 128, 1280)]
)
def test_sequences_that_fill_the_gpu_stay_whole(sequences: int, tokens: int, channels: int) -> None:
    assert choose(sequences * tokens, sequences, channels, True).chunk == 0


@pytest.mark.parametrize("channels", [1280, 2560, 5120])
@pytest.mark.parametrize("tokens", [2048, 2049, 8191, 8192, 32768, 131072])
def test_a_sequence_is_cut_into_chunks_of_which_none_is_empty(tokens: int, channels: int) -> None:
    form = choose(tokens, 1, channels, True)
    chunks = -(-tokens // form.chunk)
    assert chunks >= 3 and form.chunk % 8 == 0 and (chunks - 1) * form.chunk < tokens


def test_short_sequences_and_single_tokens_stay_whole() -> None:
    for tokens in (1, 63, 128):
        assert choose(tokens, 1, 1280, True).chunk == choose(tokens, 1, 1280, False).chunk == 0


@pytest.mark.parametrize(
    ("sequences", "tokens", "channels", "chunk"),
    [(1, 2048, 5120, 240), (1, 8192, 5120, 912), (1, 8192, 2560, 592), (1, 8192, 1280, 304),
     (1, 2048, 1280, 160), (1, 32768, 1280, 1216), (8, 2048, 1280, 0), (8, 8192, 1280, 0)],
)  # fmt: skip
def test_the_chunks_are_those_that_were_the_fastest_on_an_h100(
    sequences: int, tokens: int, channels: int, chunk: int
) -> None:
    """benchmarks/selective_scan."""
    assert choose(sequences * tokens, sequences, channels, True).chunk == chunk


def test_what_cannot_be_streamed_is_loaded_into_registers() -> None:
    assert choose(8192, 1, 1280, False).stages == 0 and choose(8192, 1, 1280, True).stages > 0
