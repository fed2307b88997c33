"""Which algorithm serves a reduction: by the table where it fits, by force, and by the next that fits."""

import json
import logging
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from ssm_dist.errors import UserError
from ssm_dist.parallel.collectives import ops, tables
from ssm_dist.parallel.collectives.groups import Group
from ssm_dist.parallel.collectives.selection import choose


def group(
    ranks: int, backend: str = "nccl", fits: tuple[str, ...] | None = ("one_shot", "two_shot", "bulk")
) -> Group:
    """A group whose shared memory, if it has one, can serve `fits`."""
    memory: Any = None
    if fits is not None:
        memory = mock.Mock(fits=lambda algorithm, *_: algorithm in fits, fits_in_one_block=lambda *_: True)
    return Group("g", mock.Mock(), 0, ranks, backend, 1.0, memory=memory)


def message(size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """So many bytes in rows of 2560."""
    return torch.empty(size // 5120, 2560, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("ranks", "codec", "size", "expected"),
    [
        (2, "none", 5120, "one_shot"), (2, "none", 3_000_000, "one_shot"), (2, "none", 20_000_000, "bulk"),
        (4, "none", 5120, "one_shot"), (4, "none", 1_000_000, "two_shot"), (4, "none", 20_000_000, "bulk"),
        (3, "none", 1_000_000, "one_shot"), (6, "none", 1_000_000, "two_shot"),
        (4, "int8", 5120, "one_shot"), (4, "int8", 20_000_000, "bulk"), (2, "int4", 20_000_000, "bulk"),
        (2, "int8", 2_000_000, "one_shot"),
    ],
)  # fmt: skip
def test_shared_memory_goes_by_size_and_ranks(ranks: int, codec: str, size: int, expected: str) -> None:
    assert choose(group(ranks), message(size), codec, 128, "auto") == expected


@pytest.mark.parametrize("algorithm", ["auto", "process_group"])
@pytest.mark.parametrize(
    ("backend", "codec", "size", "expected"),
    [
        ("nccl", "none", 20_000_000, "all_reduce"), ("nccl", "int8", 5120, "all_reduce"),
        ("nccl", "int8", 20_000_000, "exchange"), ("gloo", "none", 5120, "all_reduce"),
        ("gloo", "fp8", 5120, "exchange"),
    ],
)  # fmt: skip
def test_without_shared_memory_the_process_group_serves(
    algorithm: str, backend: str, codec: str, size: int, expected: str
) -> None:
    shared = ("one_shot", "bulk") if algorithm == "process_group" else None
    assert choose(group(4, backend, shared), message(size), codec, 128, algorithm) == expected


@pytest.mark.parametrize("algorithm", tables.SERVING)
def test_what_is_asked_for_serves_where_it_fits(algorithm: str) -> None:
    assert choose(group(2), message(5120), "int8", 128, algorithm) == algorithm


@pytest.mark.parametrize("fits", [("bulk",), (), None])
def test_what_is_asked_for_and_does_not_fit_goes_another_way(fits: tuple[str, ...] | None) -> None:
    expected = "bulk" if fits else "all_reduce"
    assert choose(group(2, "nccl", fits), message(5120), "none", 128, "one_shot") == expected


def test_it_says_so_in_one_line_whatever_the_shapes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_announced", set())
    with caplog.at_level(logging.INFO, logger=ops.logger.name):
        for size in (5120, 51200, 512000):
            ops._chosen(group(2, "nccl", None), message(size), "none", 128, "one_shot")
            ops._chosen(group(2, "nccl", None), message(size), "none", 128, "auto")
    assert caplog.messages == [
        "reductions: all_reduce serves where one_shot cannot, as for (1, 2560) of torch.bfloat16, "
        "since the ranks share no memory"
    ]


@pytest.mark.parametrize(
    ("fits", "codec", "rows", "expected"),
    [
        (("one_shot", "bulk"), "none", 4000, True),  # bulk
        (("one_shot", "bulk"), "none", 4, False),  # one_shot
        (None, "none", 4000, False),  # NCCL's own sum is whole on every rank
        (None, "int8", 4000, False),  # exchange: the norm is little of its time
        (None, "int8", 4, False),  # all_reduce
        (("one_shot", "bulk"), "int8", 1, False),  # fewer rows than ranks
    ],
)
def test_the_stream_is_split_where_long_messages_go_over_shared_memory(
    fits: tuple[str, ...] | None, codec: str, rows: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "group_named", lambda name: group(2, "nccl", fits))
    monkeypatch.setattr(ops, "is_registered", lambda name: True)
    assert ops.splits_residual(message(5120 * rows), "g", codec, 128, "auto") is expected


def test_integers_and_float64_are_summed_as_they_are() -> None:
    for dtype in (torch.int64, torch.float64):
        assert choose(group(2), message(51200, dtype), "none", 128, "auto") == "all_reduce"


# --- tables -------------------------------------------------------------------------------------------------


def test_a_table_survives_its_file() -> None:
    assert tables.table_from_json(tables.table_to_json(tables.SHIPPED), "x") == tables.SHIPPED


def test_another_table_changes_the_choice() -> None:
    other = {
        t: {2: tables._rows([(tables.ANY, "all_reduce")], [(tables.ANY, "exchange")])}
        for t in tables.TRANSPORTS
    }
    try:
        tables.use_table(other)
        assert choose(group(2), message(5120), "int8", 128, "auto") == "exchange"
    finally:
        tables.use_table(tables.SHIPPED)


def changed(**fields: Any) -> str:
    records = json.loads(tables.table_to_json(tables.SHIPPED))
    records[0] |= fields
    return json.dumps(records)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no json", "JSONDecodeError"),
        ("[]", "nothing for shared, codec none"),
        (changed(transport="smoke"), "KeyError: 'smoke'"),
        (changed(transport="gloo", rows=[[None, "bulk"]]), "gloo has no algorithm 'bulk'"),
        (changed(rows=[[5, "bulk"]]), "end with null"),
        (changed(rows=[[9, "bulk"], [5, "one_shot"], [None, "bulk"]]), "must rise"),
        (changed(codec="int16"), "nothing for shared, codec none"),
    ],
)
def test_a_file_that_is_no_table_is_refused_with_its_name(text: str, says: str) -> None:
    with pytest.raises(UserError, match=rf"table\.json is no table of reductions: .*{says}"):
        tables.table_from_json(text, "table.json")


def test_simulated_ranks_split_nothing() -> None:
    assert not ops.splits_residual(message(5120 * 4000), "simulated 0 2", "none", 128, "auto")
