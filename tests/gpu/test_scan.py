"""The forms of the selective scan on a GPU, at real shapes, against float64; -k small: compute-sanitizer."""

import pytest
import torch

from ssm_dist import kernels
from ssm_dist.kernels import backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available()
        or torch.cuda.get_device_capability() != (9, 0)
        or backend.interpreting(),
        reason="needs a Hopper GPU",
    ),
]

MIXED = [1000, 0, 1, 63, 2, 0, 3, 977, 4, 31]


def assert_exact(form: tuple[int | None, ...] | None, lengths: list[int], **shape: int) -> None:
    """Output within 3e-3 of float64, states within 1e-5, the same bits again, other slots untouched."""
    from ssm_dist.kernels.gluon_form import Form
    from tests.gpu import bench_scan

    arguments = bench_scan.inputs(lengths, **shape)
    some = torch.arange(0, shape["channels"], max(1, shape["channels"] // 61), device="cuda")
    run = kernels.selective_scan if form is None else bench_scan.gluon(Form(*form))
    with backend.using("triton", "cuda"):
        found = bench_scan.check(run, arguments, some, bench_scan.exact(arguments, lengths, some))
    assert found["good"], found


@pytest.mark.parametrize(
    "form", [(0, 4, 1, 1), (0, 1, 2, 0), (112, 2, 2, 2), (256, 4, 1, 1), (16, 1, 1, 3)], ids=str
)
@pytest.mark.parametrize(("channels", "groups"), [(5120, 1), (3584, 2), (1284, 2)])
def test_forms_of_ragged_batches(form: tuple[int, ...], channels: int, groups: int) -> None:
    assert_exact(form, MIXED, channels=channels, groups=groups)


@pytest.mark.parametrize(
    "form",
    [
        (0, 1, 1, 0, 4, 96),
        (0, 1, 1, 2, 6, None),
        (112, 1, 1, 1, 4, None, 16),
        (16, 1, 1, 0, 5, 96),
        (64, 1, 1, 1, 4, 112, 8),
    ],
    ids=str,
)
@pytest.mark.parametrize(("channels", "groups"), [(5120, 1), (3584, 2), (1296, 2)])
def test_streaming_forms_of_ragged_batches(form: tuple[int | None, ...], channels: int, groups: int) -> None:
    assert_exact(form, MIXED, channels=channels, groups=groups)


@pytest.mark.parametrize("states", [16, 32, 64])
@pytest.mark.parametrize("form", [(0, 4, 1, 1), (32, 4, 1, 1)], ids=str)
def test_small_state_sizes(form: tuple[int, ...], states: int) -> None:
    assert_exact(form, [70, 1, 0, 9], channels=64, states=states)


@pytest.mark.parametrize("lengths", [[8192], [2048] * 8, [32768], [1], [131, 1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("channels", [1280, 5120])
def test_the_form_that_is_chosen(lengths: list[int], channels: int) -> None:
    assert_exact(None, lengths, channels=channels)


@pytest.mark.parametrize("lengths", [[300], [40, 7, 0, 21]], ids=str)
def test_a_captured_and_compiled_scan(lengths: list[int]) -> None:
    from tests.gpu import bench_scan

    arguments = bench_scan.inputs(lengths, 256)
    before = arguments[8].clone()
    with backend.using("triton", "cuda"):
        wanted = kernels.selective_scan(*arguments)
        after = arguments[8].clone()
        step = torch.compile(kernels.selective_scan, fullgraph=True)
        step(*arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = step(*arguments)
    arguments[8].copy_(before)
    graph.replay()
    assert torch.equal(y, wanted) and torch.equal(arguments[8], after)


def test_nan_stays_in_its_sequence_and_its_channel() -> None:
    from tests.gpu import bench_scan

    arguments = bench_scan.inputs([40, 70, 33], 256)
    arguments[0][50, 17] = torch.nan
    with backend.using("triton", "cuda"):
        y = kernels.selective_scan(*arguments)
    spoilt = torch.zeros_like(y, dtype=torch.bool)
    spoilt[48:110, 17] = True  # from the first of the four tokens that enter together
    assert torch.equal(y.isnan(), spoilt)
