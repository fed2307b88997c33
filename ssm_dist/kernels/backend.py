"""The one place where an op's implementation is chosen.

Every op has a definition in plain torch (`reference`); faster implementations register themselves beside it
when their module is imported. Which one serves an op in which backend stands in `SERVES`. The choice is made
once, when a process starts, so that all ranks run the same code; until then the definitions run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal, TypeVar, get_args

import torch

from ssm_dist.errors import UserError

BackendName = Literal["auto", "reference", "triton", "mamba_ssm"]
Implementation = TypeVar("Implementation", bound=Callable[..., Any])

SERVES: dict[str, dict[str, str]] = {
    "add_rms_norm": {"triton": "triton", "mamba_ssm": "triton"},
    "causal_conv": {"triton": "triton", "mamba_ssm": "triton"},
    "causal_conv_update": {"triton": "triton", "mamba_ssm": "mamba_ssm"},
    "decode_rows": {"triton": "triton", "mamba_ssm": "triton"},
    "encode_rows": {"triton": "triton", "mamba_ssm": "triton"},
    "encode_rows_with_feedback": {"triton": "triton", "mamba_ssm": "triton"},
    "gated_gelu": {"triton": "triton", "mamba_ssm": "triton"},
    "largest": {"triton": "triton", "mamba_ssm": "triton"},
    "linear": {"triton": "triton", "mamba_ssm": "triton"},
    "load_last": {"triton": "triton", "mamba_ssm": "triton"},
    "paged_attention": {"triton": "triton", "mamba_ssm": "triton"},
    "project_heads": {"triton": "triton", "mamba_ssm": "triton"},
    "projected_state_update": {"triton": "triton", "mamba_ssm": "reference"},
    "rms_normalize": {"triton": "triton", "mamba_ssm": "triton"},
    "selective_scan": {"triton": "triton", "mamba_ssm": "triton"},
    "selective_state_update": {"triton": "triton", "mamba_ssm": "mamba_ssm"},
    "store_last": {"triton": "triton", "mamba_ssm": "triton"},
    "sum_rows": {"triton": "triton", "mamba_ssm": "triton"},
    "sum_rows_with_feedback": {"triton": "triton", "mamba_ssm": "triton"},
}
"""Op -> backend -> whose implementation serves it. In backend `reference` it is always the definition."""

MODULES = {
    "reference": (),
    "triton": (
        "triton_conv", "triton_update", "triton_norm", "triton_scan", "triton_attention", "triton_codecs",
        "triton_linear", "triton_projected_update", "triton_activation", "triton_argmax",
        "triton_last_tokens",
    ),
    "mamba_ssm": ("mamba_ssm_backend",),
}  # fmt: skip
"""What has to be imported before an implementation can serve."""

NEEDS = {
    "triton": "pip install triton (torch brings it on Linux GPU hosts)",
    "mamba_ssm": "pip install mamba-ssm causal-conv1d (both compile CUDA code: nvcc and torch must match)",
}

MAMBA_SSM_LEAVES = (
    "kernels: mamba_ssm serves the decode step's convolution and state update; the prompt's scan and "
    "convolution run in triton, since mamba-ssm's scan takes no initial state and causal-conv1d none for "
    "packed sequences; so do norms and attention"
)

logger = logging.getLogger(__name__)
_implementations: dict[str, dict[str, Callable[..., Any]]] = {}
_selected = "reference"
_serving: dict[str, str] = dict.fromkeys(SERVES, "reference")
_announced: set[str] = set()


def register(op: str, origin: str) -> Callable[[Implementation], Implementation]:
    """Decorator: `fn` implements `op`; `origin` is reference, triton or mamba_ssm."""
    assert op in SERVES, f"{op} is missing in SERVES"

    def add(fn: Implementation) -> Implementation:
        _implementations.setdefault(op, {})[origin] = fn
        return fn

    return add


def implementation(op: str) -> Callable[..., Any]:
    """The function that implements `op` in the selected backend."""
    return _implementations[op][_serving[op]]


def serving(op: str) -> str:
    """Where the function that implements `op` is from: reference, triton or mamba_ssm."""
    return _serving[op]


def select(name: BackendName, device: torch.device | str | None = None) -> str:
    """Choose the backend of all ops for this process; returns the name of the one that will run.

    `device` is where the model will run; without it, a GPU where there is one. `auto` is triton on a GPU and
    the definitions on a CPU, where nothing else is fast. Raises `UserError`, saying what to install, when the
    backend cannot run here.
    """
    global _selected, _serving
    kind = torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    chosen = _resolve_auto(kind) if name == "auto" else name
    if chosen not in get_args(BackendName):
        raise UserError(f"[kernels] backend = {name!r} is unknown; choose one of {get_args(BackendName)}")
    serving = {op: by.get(chosen, "reference") for op, by in SERVES.items()}
    for origin in sorted(set(serving.values())):
        _load(origin, chosen, kind)
    _selected, _serving = chosen, serving
    _announce(f"kernels: {chosen}")
    if chosen == "mamba_ssm":
        _announce(MAMBA_SSM_LEAVES)
    return chosen


def resolved() -> str:
    """The name of the backend that runs."""
    return _selected


@contextlib.contextmanager
def using(
    name: BackendName, device: torch.device | str | None = None, definitions: Collection[str] = ()
) -> Iterator[None]:
    """Run a block with another backend, some ops by their definitions (tests and benchmarks)."""
    global _selected, _serving
    previous = _selected, _serving
    select(name, device)
    _serving = _serving | dict.fromkeys(definitions, "reference")
    try:
        yield
    finally:
        _selected, _serving = previous


def interpreting() -> bool:
    """Whether Triton's interpreter stands in for a GPU (tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _resolve_auto(kind: str) -> str:
    if kind != "cuda":
        return "reference"
    if importlib.util.find_spec("triton") is None:
        _announce(f"kernels: triton is not installed, so the slow definitions will run; {NEEDS['triton']}")
        return "reference"
    return "triton"


def _load(origin: str, backend: str, kind: str) -> None:
    """Import the implementations of one origin; a failure becomes one clear `UserError`."""
    if origin != "reference" and kind != "cuda" and not interpreting():
        raise UserError(f"[kernels] backend = {backend!r} needs a GPU; on a {kind} choose auto or reference")
    for module in MODULES[origin]:
        try:
            importlib.import_module(f"ssm_dist.kernels.{module}")
        except Exception as error:
            raise UserError(
                f"[kernels] backend = {backend!r} cannot run here: {type(error).__name__}: {error}. "
                f"To have it: {NEEDS[origin]}. Or choose [kernels] backend = 'reference'."
            ) from error


def _announce(line: str) -> None:
    """Log a line once a process, however often a backend is selected."""
    if line not in _announced:
        _announced.add(line)
        logger.info(line)
