"""Two halves take turns: the order of what they do, what they return, and how they fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from ssm_dist.parallel import TensorParallel, interleaving, styles
from ssm_dist.parallel.collectives import EXACT
from ssm_dist.parallel.collectives.groups import _groups, group_named, register_lone_rank
from ssm_dist.parallel.interleaving import Interleaver, begin_left_sum, beside, in_halves
from ssm_dist.parallel.styles import DeferredLinear, Rowwise

Run = Callable[[], str]


@pytest.fixture
def group() -> Iterator[str]:
    yield register_lone_rank("turns", 2).name
    del _groups["turns"]


@pytest.fixture(scope="module")
def interleaver() -> Interleaver:
    return Interleaver(torch.device("cpu"))


def half(name: str, layers: int, log: list[str], group: str, *, scans: bool = True) -> Run:
    """A model's half: in every layer a product, a scan, and a sum at the end."""

    def run() -> str:
        found = ""
        for layer in range(layers):
            log.append(f"{name}{layer} product")
            if scans:
                begin_left_sum()
            log.append(f"{name}{layer} scan")

            def add_up(layer: int = layer) -> str:
                log.append(f"{name}{layer} sum")
                return f"{name}{layer} "

            found += beside(add_up, group)
        return found

    return run


def test_a_half_leaves_no_linear_layer_to_its_norm(
    monkeypatch: pytest.MonkeyPatch, group: str, interleaver: Interleaver
) -> None:
    """Which would multiply and sum in one: halves hand over at sums."""
    monkeypatch.setattr(styles, "pushes_product", lambda *_, **__: True)
    layer, ranks = torch.nn.Linear(8, 4, bias=False), SimpleNamespace(rank=0, group=group, reductions=EXACT)
    Rowwise(before_norm=True).install(layer, cast(TensorParallel, ranks))
    x = torch.randn(3, 8)

    def leaves() -> tuple[bool, bool]:
        return in_halves(), isinstance(layer(x), DeferredLinear)

    assert leaves() == (False, True)
    assert interleaver.run(leaves, leaves) == ((True, False), (True, False))


def test_a_sum_begins_where_the_other_half_scans(group: str, interleaver: Interleaver) -> None:
    log: list[str] = []
    results = interleaver.run(half("a", 2, log, group), half("b", 2, log, group))
    assert results == ("a0 a1 ", "b0 b1 ")
    assert log == [
        "a0 product", "a0 scan",
        "b0 product", "a0 sum", "b0 scan",
        "a1 product", "b0 sum", "a1 scan",
        "b1 product", "a1 sum", "b1 scan",
        "b1 sum",
    ]  # fmt: skip


def test_without_scans_a_sum_begins_where_the_other_half_needs_one(
    group: str, interleaver: Interleaver
) -> None:
    log: list[str] = []
    interleaver.run(half("a", 1, log, group, scans=False), half("b", 1, log, group, scans=False))
    assert log == ["a0 product", "a0 scan", "b0 product", "b0 scan", "a0 sum", "b0 sum"]


@pytest.mark.parametrize(("first", "second"), [(0, 3), (3, 0), (1, 3), (3, 1), (0, 0)])
def test_halves_of_different_lengths_both_end(
    first: int, second: int, group: str, interleaver: Interleaver
) -> None:
    log: list[str] = []
    results = interleaver.run(half("a", first, log, group), half("b", second, log, group))
    assert results == tuple("".join(f"{n}{i} " for i in range(k)) for n, k in (("a", first), ("b", second)))
    sums = [line for line in log if line.endswith("sum")]
    assert sorted(sums) == sorted(f"{n}{i} sum" for n, k in (("a", first), ("b", second)) for i in range(k))


def test_alone_a_sum_is_made_at_once(group: str) -> None:
    log: list[str] = []
    half("a", 2, log, group)()
    assert log == ["a0 product", "a0 scan", "a0 sum", "a1 product", "a1 scan", "a1 sum"]


@pytest.mark.parametrize("who", ["first", "second"])
@pytest.mark.parametrize("where", ["its start", "its sum"])
def test_an_error_in_one_half_ends_both(who: str, where: str, group: str, interleaver: Interleaver) -> None:
    def failing() -> str:
        def fail() -> str:
            raise ValueError("no more")

        return fail() if where == "its start" else beside(fail, group)

    good = half("a", 3, [], group)
    with pytest.raises(ValueError, match="no more"):
        interleaver.run(*((failing, good) if who == "first" else (good, failing)))
    assert interleaver.run(half("a", 1, [], group), half("b", 1, [], group)) == ("a0 ", "b0 ")


def test_after_one_half_has_failed_the_other_begins_no_sum(group: str) -> None:
    """Nor goes on: an interrupt ends the half that waits for its turn while the other one runs."""
    pair, log = interleaving._Pair(None), list[str]()
    pair.left = interleaving._Sum(lambda: log.append("a sum that was left"), group_named(group))
    pair.failed = True
    with pytest.raises(interleaving._OtherHasFailed):
        pair.begin_left(before_scan=True)
    with pytest.raises(interleaving._OtherHasFailed):
        pair.halves[1].sum(lambda: log.append("another sum"), group_named(group))
    assert not log


def test_both_halves_run_in_the_caller_s_modes(group: str, interleaver: Interleaver) -> None:
    with torch.inference_mode():
        assert interleaver.run(torch.is_inference_mode_enabled, torch.is_inference_mode_enabled) == (
            True,
            True,
        )
    assert interleaver.run(torch.is_inference_mode_enabled, torch.is_inference_mode_enabled) == (False, False)
