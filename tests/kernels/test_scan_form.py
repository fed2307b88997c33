"""Which form of the Gluon scan is taken, where no GPU is needed to say so."""

import pytest

from ssm_dist.kernels.gluon_form import SCHEDULERS, choose

WHOLE = (0, 0)
MEASURED: dict[tuple[int, int, int], dict[tuple[int, int], float]] = {
    (1, 2048, 1280): {(152, 16): 0.0399, (160, 0): 0.0432, (80, 8): 0.0449, (104, 8): 0.0461},
    (1, 2048, 2560): {(152, 16): 0.0696, (304, 40): 0.0699, (208, 24): 0.0711, (160, 0): 0.0743},
    (1, 2048, 5120): {(232, 0): 0.1220, (232, 32): 0.1243, (240, 0): 0.1284, WHOLE: 0.1387},
    (1, 8192, 1280): {(592, 88): 0.1275, (312, 40): 0.1342, (304, 0): 0.1356, (248, 32): 0.1481},
    (1, 8192, 2560): {(592, 88): 0.2416, (488, 72): 0.2496, (592, 0): 0.2507, (1200, 176): 0.2549},
    (1, 8192, 5120): {(912, 0): 0.4667, (928, 136): 0.4640, (1200, 176): 0.4817, WHOLE: 0.5474},
    (1, 32768, 1280): {(2368, 352): 0.4961, (1216, 0): 0.4992, (976, 144): 0.4993, (1224, 176): 0.5003},
    (1, 32768, 5120): {(3648, 0): 1.8116, (3704, 552): 1.8437, (4784, 712): 1.9132, WHOLE: 2.2027},
    (4, 2048, 5120): {WHOLE: 0.3444, (720, 104): 0.4101, (536, 80): 0.4314},
    (8, 2048, 1280): {WHOLE: 0.2293, (536, 80): 0.2450, (264, 32): 0.2451, (424, 56): 0.2590},
    (8, 2048, 2560): {WHOLE: 0.3433, (536, 80): 0.4381, (720, 104): 0.4456},
    (8, 8192, 1280): {WHOLE: 0.8971, (1048, 152): 0.9329, (2128, 312): 0.9494, (1696, 248): 1.0098},
}
"""Sequences, tokens of each, channels -> tokens of a chunk, and the first one's fewer -> ms on an H100."""


@pytest.mark.parametrize("shape", MEASURED, ids=str)
def test_what_is_chosen_took_at_most_a_hundredth_longer_than_the_fastest_measured(
    shape: tuple[int, int, int],
) -> None:
    """benchmarks/selective_scan has all that was measured."""
    sequences, tokens, channels = shape
    form, times = choose(sequences * tokens, sequences, channels, True), MEASURED[shape]
    assert times[form.chunk, form.cut] <= 1.01 * min(times.values())


@pytest.mark.parametrize(
    ("sequences", "tokens", "channels"), [(8, 8192, 8192), (8, 8192, 5120), (8, 2048, 5120), (64, 128, 1280)]
)
def test_sequences_that_fill_the_gpu_stay_whole(sequences: int, tokens: int, channels: int) -> None:
    assert choose(sequences * tokens, sequences, channels, True).chunk == 0


@pytest.mark.parametrize(("sequences", "channels"), [(1, 1280), (1, 2560), (1, 5120), (2, 1280), (3, 1024)])
@pytest.mark.parametrize("tokens", [2048, 2049, 8191, 8192, 32768, 131072])
def test_sequences_are_cut_into_chunks_of_which_none_is_empty(
    tokens: int, channels: int, sequences: int
) -> None:
    form = choose(sequences * tokens, sequences, channels, True)
    chunks = -(-(tokens + form.cut) // form.chunk)
    assert form.chunk % 8 == form.cut % 8 == 0 and 0 <= form.cut < form.chunk
    assert chunks >= 3 and (chunks - 1) * form.chunk < tokens + form.cut
    assert sequences * channels / 16 * (chunks - 1) <= 5 * SCHEDULERS


def test_short_sequences_and_single_tokens_stay_whole() -> None:
    for tokens in (1, 63, 128):
        assert choose(tokens, 1, 1280, True).chunk == choose(tokens, 1, 1280, False).chunk == 0


def test_what_cannot_be_streamed_is_loaded_into_registers() -> None:
    assert choose(8192, 1, 1280, False).stages == 0 and choose(8192, 1, 1280, True).stages > 0
