"""The choice of backend, and what a backend's ops promise to torch.compile."""

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_dist import kernels
from ssm_dist.errors import UserError
from ssm_dist.kernels import backend, codecs
from tests.kernels.inputs import conv_inputs, scan_inputs


@pytest.fixture(autouse=True)
def own_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test chooses for itself, and its log is its own."""
    monkeypatch.setattr(backend, "_selected", backend._selected)
    monkeypatch.setattr(backend, "_serving", backend._serving)
    monkeypatch.setattr(backend, "_announced", set())


@pytest.fixture
def fake_peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, Any]]]:
    """Stand-ins for causal-conv1d and mamba-ssm that compute by our definitions from their arguments."""
    calls: dict[str, dict[str, Any]] = {}

    def causal_conv1d_update(
        x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None,
        activation: str | None = None, cache_seqlens: Tensor | None = None,
        conv_state_indices: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        calls["conv"] = {
            "activation": activation,
            "shape": conv_state.shape,
            "same": conv_state.dtype == x.dtype,
        }
        with backend.using("reference"):
            return kernels.causal_conv_update(x, weight, bias, conv_state.transpose(1, 2), conv_state_indices)

    def selective_state_update(
        state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
        z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
        state_batch_indices: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        calls["update"] = {"softplus": dt_softplus, "shape": state.shape}
        flat = [t.flatten(1) for t in (x, dt, z)]
        with backend.using("reference"):
            y = kernels.selective_state_update(
                flat[0], flat[1], torch.log(-A).flatten(0, 1), B, C, D.flatten(), flat[2], dt_bias.flatten(),
                state.view(len(state), -1, state.shape[-1]), state_batch_indices,
            )  # fmt: skip
        return y.view_as(x)

    _pretend(monkeypatch, "causal_conv1d", causal_conv1d_update=causal_conv1d_update)
    for package in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        _pretend(monkeypatch, package)
    _pretend(
        monkeypatch,
        "mamba_ssm.ops.triton.selective_state_update",
        selective_state_update=selective_state_update,
    )
    yield calls


def _pretend(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Callable[..., Any]) -> None:
    module = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def test_the_definitions_run_until_something_is_selected() -> None:
    assert backend.resolved() == "reference"
    assert all(backend.implementation(op).__name__ == f"{op}_reference" for op in backend.SERVES)


@pytest.mark.parametrize(
    ("device", "chosen"), [("cpu", "reference"), ("cuda", "triton"), ("meta", "reference")]
)
def test_auto_goes_by_the_device(device: str, chosen: str) -> None:
    if chosen == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    assert backend.select("auto", device) == backend.resolved() == chosen


def test_auto_without_triton_says_once_that_the_definitions_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with caplog.at_level(logging.INFO, logger=backend.logger.name):
        assert [backend.select("auto", "cuda") for _ in range(3)] == ["reference"] * 3
    assert [("not installed" in line, "pip install" in line) for line in caplog.messages] == [
        (True, True),
        (False, False),
    ]


def test_selecting_triton_on_a_cpu_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="needs a GPU; on a cpu choose auto or reference"):
        backend.select("triton", "cpu")
    assert backend.resolved() == "reference"


def test_an_unknown_backend_names_the_known() -> None:
    with pytest.raises(UserError, match=r"'cutlass' is unknown; choose one of .*triton.*mamba_ssm"):
        backend.select("cutlass", "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [ImportError("no module named causal_conv1d"), OSError("undefined symbol")])
def test_a_missing_or_broken_backend_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(name: str) -> ModuleType:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(UserError, match=f"{error}.*pip install mamba-ssm causal-conv1d.*'reference'"):
        backend.select("mamba_ssm", "cuda")
    assert backend.resolved() == "reference"


def test_every_op_is_served_in_every_backend() -> None:
    assert set(backend.SERVES) == {*kernels.__all__, *codecs.OPS}
    for name in ("triton", "mamba_ssm"):
        assert all(by[name] in (*backend.MODULES, "reference") for by in backend.SERVES.values())


@pytest.mark.usefixtures("triton_backend")
def test_mamba_ssm_serves_decoding_and_says_what_it_leaves(
    fake_peers: dict[str, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    conv, scan = conv_inputs([1] * 3, 6, 4, torch.float32), scan_inputs([1] * 3, 6, 16, 2, torch.float32)
    expected = []
    with caplog.at_level(logging.INFO, logger=backend.logger.name):
        for name in ("reference", "mamba_ssm"):
            with backend.using(name, "cpu"):
                states = conv[3].clone(), scan[8].clone()
                y = kernels.causal_conv_update(*conv[:3], states[0], conv[-1])
                u = kernels.selective_state_update(*scan[:8], states[1], scan[-1])
                expected.append((y, u, *states))
    torch.testing.assert_close(*expected)
    assert fake_peers["conv"] == {"activation": "silu", "shape": (12, 6, 3), "same": True}
    assert fake_peers["update"] == {"softplus": True, "shape": (12, 2, 3, 16)}
    assert sum("takes no initial state" in line for line in caplog.messages) == 1


def _conv(mine: list[Any]) -> Tensor:
    return kernels.causal_conv(*mine)


def _conv_update(mine: list[Any]) -> Tensor:
    return kernels.causal_conv_update(*mine[:-2], mine[-1])


def _state_update(mine: list[Any]) -> Tensor:
    return kernels.selective_state_update(*mine[:-2], mine[-1])


def _projected_update(mine: list[Any]) -> Tensor:
    x, given, weight = mine[0], torch.cat([mine[1][:, None, :3], mine[3], mine[4]], -1), mine[0].T[:, :3]
    return kernels.projected_state_update(x, given, weight.contiguous(), mine[2], *mine[5:9], mine[-1], 1e-6)


def _linear(mine: list[Any]) -> Tensor:
    return kernels.linear(mine[0], mine[0].contiguous(), mine[0][:, 0])


def _norms(mine: list[Any]) -> Tensor:
    y, total = kernels.add_rms_norm(mine[0], None, mine[0][0], 1e-5)
    z, total = kernels.add_rms_norm(y, total, mine[0][1], 1e-5)
    z, total = kernels.add_rms_norm(None, z + total, mine[0][1], 1e-5)
    return kernels.rms_normalize(z, 1e-5) + total


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize(
    ("run", "make", "state"),
    [
        (_conv, conv_inputs, 3),
        (_conv_update, conv_inputs, 3),
        (_state_update, scan_inputs, 8),
        (_projected_update, scan_inputs, 8),
        (_linear, conv_inputs, 3),
        (_norms, conv_inputs, 3),
    ],
)
def test_ops_compile_whole_with_their_state_in_place(
    run: Callable[[list[Any]], Tensor], make: Callable[..., list[Any]], state: int
) -> None:
    """Fake implementations and the mutation of the state, as torch.compile sees them."""
    inputs = make([1, 1, 1], dtype=torch.float32)
    eager = [t.clone() if i == state else t for i, t in enumerate(inputs)]
    expected = run(eager)
    y = torch.compile(run, fullgraph=True, backend="aot_eager")(inputs)
    assert torch.equal(y, expected) and torch.equal(inputs[state], eager[state])
