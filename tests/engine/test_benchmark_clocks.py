"""Clock and energy of a GPU while cases run; where there is none, nothing is said of them."""

import itertools
import logging
import threading
import time

import pytest
import torch

from ssm_dist.benchmark.clocks import INTERVAL, ClockWatch, Reading, clock_watch
from ssm_dist.benchmark.timing import Sample


def watch_of(readings: list[Reading]) -> ClockWatch:
    """One that has read these, and then fails."""
    given, all_read = iter(readings), threading.Event()

    def read() -> Reading:
        for reading in given:
            return reading
        all_read.set()
        raise RuntimeError("nothing more")

    watch = ClockWatch(read)
    with watch:
        assert all_read.wait(30.0)
    return watch


def test_spans_count_what_was_read_within_them() -> None:
    watch = watch_of([
        Reading(1.0, 1980, 100.0, False), Reading(2.0, 1500, 500.0, True), Reading(3.0, 1600, 1100.0, True),
        Reading(4.0, 345, 1200.0, False), Reading(5.0, 1700, 1900.0, True), Reading(6.0, 1980, 2100.0, False),
    ])  # fmt: skip
    # 600 J in a second and 200 in another; the reading at 4 s lies outside
    assert watch.over([(1.5, 3.5), (4.5, 6.0)]) == {"mhz": 1650, "watts": 400, "capped": 0.75}
    assert watch.over([(1.5, 3.5)]) == {"mhz": 1550, "watts": None, "capped": 1.0}, "too short for its power"
    assert watch.over([(1.5, 2.5)]) is None, "one reading tells no power"
    assert watch.over([]) is None


def test_it_reads_until_it_is_left() -> None:
    counted, enough = itertools.count(), threading.Event()

    def read() -> Reading:
        number = next(counted)
        if number == 5:
            enough.set()
        return Reading(time.perf_counter(), 1000 + number, 0.0, False)

    begin = time.perf_counter()
    with ClockWatch(read) as watch:
        assert enough.wait(30.0)
    found, read_so_far = watch.over([(begin, time.perf_counter())]), next(counted)
    assert found is not None and 1002 <= found["mhz"] < 1000 + read_so_far
    time.sleep(3 * INTERVAL)
    assert next(counted) == read_so_far + 1


def test_the_moments_of_a_sample() -> None:
    sample = Sample(21.0, [[1.0, 12.0, 16.0], [10.0, 12.1, 14.1, 18.1]], arrival=100.0)
    assert sample.whole == (100.0, 121.0)
    assert sample.decoding == (110.0, 116.0)
    assert Sample(3.0, [[1.0, 2.0], [3.0, 4.0]]).decoding == (3.0, 3.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_or_its_library_there_are_no_clocks(caplog: pytest.LogCaptureFixture) -> None:
    assert clock_watch(torch.device("cpu")) is None
    with caplog.at_level(logging.INFO, "ssm_dist"):
        assert clock_watch(torch.device("cuda")) is None
    assert "no clocks" in caplog.text
