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
    chunks = -(-(tokens + form.cut) // form.chunk)
    assert chunks >= 3 and form.chunk % 8 == 0
    assert form.chunk > form.cut and (chunks - 1) * form.chunk - form.cut < tokens


def test_short_sequences_and_single_tokens_stay_whole() -> None:
    for tokens in (1, 63, 128):
        assert choose(tokens, 1, 1280, True).chunk == choose(tokens, 1, 1280, False).chunk == 0


def test_what_cannot_be_streamed_is_loaded_into_registers() -> None:
    assert choose(8192, 1, 1280, False).stages == 0 and choose(8192, 1, 1280, True).stages > 0
