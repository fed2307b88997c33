"""A differentiable parallel selective scan that stands in for transformers' loop over tokens while training.

transformers computes the recurrence of Mamba (arXiv:2312.00752, eq. 2) one token at a time. Here the same
function takes about L / 16 steps in plain torch (`TORCH`), or one Triton kernel each way
(`scan_triton.TRITON`); its gradient is written out by hand, so that only the states are kept for it. Function
and gradients are compared with transformers' own before every training (`verify`).

    s_t = exp(dt_t A) s_{t-1} + dt_t u_t B_t,    y_t = sum_n C_tn s_tn

Letters: b sequences, L tokens, D channels, N states a channel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16
"""Tokens that one chunk of the parallel scan holds: 2 * 16 + L / 16 steps."""


def linear_recurrence(decay: Tensor, value: Tensor, *, reverse: bool = False) -> Tensor:
    """s_t = decay_t * s_{t-1} + value_t along dimension 1, from s = 0; from the last token on if `reverse`.

    Chunks run side by side: once from zero to learn what each adds to its state, then once more from the true
    states. Decays are only multiplied, never divided by, so that their underflow to zero is harmless.

    Args:
        decay, value: (b, L, D, N). Returns the states, (b, L, D, N).
    """
    length = value.shape[1]
    if length % CHUNK:
        padding = (0, 0, 0, 0, 0, -length % CHUNK)
        decay, value = F.pad(decay, padding), F.pad(value, padding)
    decay, value = (x.unflatten(1, (-1, CHUNK)) for x in (decay, value))
    tokens, chunks = list(range(CHUNK)), list(range(value.shape[1]))
    if reverse:
        tokens.reverse()
        chunks.reverse()
    added = torch.zeros_like(value[:, :, 0])
    for t in tokens:
        added = torch.addcmul(value[:, :, t], decay[:, :, t], added)
    whole = decay.prod(2)
    state = torch.zeros_like(added[:, 0])
    start = torch.empty_like(added)
    for c in chunks:
        start[:, c] = state
        state = torch.addcmul(added[:, c], whole[:, c], state)
    states = torch.empty_like(value)
    for t in tokens:
        start = torch.addcmul(value[:, :, t], decay[:, :, t], start, out=states[:, :, t])
    return states.flatten(1, 2)[:, :length]


class Core(NamedTuple):
    """One implementation of the scan and of its gradient."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    """u, dt (b, L, D), A (D, N), B, C (b, L, N) -> y (b, L, D), states (b, L, D, N)"""
    backward: Callable[..., tuple[Tensor, ...]]
    """gradient of y, u, dt, A, B, C, states -> gradients of u, dt, A, B, C"""


def torch_forward(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """See `Core.forward`."""
    states = linear_recurrence(torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None])
    return (states * C[:, :, None]).sum(-1), states


def torch_backward(
    dy: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor
) -> tuple[Tensor, ...]:
    """See `Core.backward`. The gradient of s_t is one more recurrence: g_t = C_t dy_t + a_{t+1} g_{t+1}."""
    next_dt = F.pad(dt[:, 1:], (0, 0, 0, 1))
    g = linear_recurrence(torch.exp(next_dt[..., None] * A), dy[..., None] * C[:, :, None], reverse=True)
    dC = (states * dy[..., None]).sum(2)
    dB = (g * (dt * u)[..., None]).sum(2)
    d_input = (g * B[:, :, None]).sum(-1)
    previous = F.pad(states[:, :-1], (0, 0, 0, 0, 1, 0))
    d_exponent = g.mul_(previous).mul_(torch.exp(dt[..., None] * A))
    d_dt = d_input * u + (d_exponent * A).sum(-1)
    dA = (d_exponent * dt[..., None]).sum((0, 1))
    return d_input * dt, d_dt, dA, dB, dC


TORCH = Core(torch_forward, torch_backward)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, core: Core, *inputs: Tensor) -> Tensor:
        inputs = tuple(x.contiguous() for x in inputs)
        y, states = core.forward(*inputs)
        ctx.core = core
        ctx.save_for_backward(*inputs, states)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.core.backward(dy.contiguous(), *ctx.saved_tensors)


def scan_like(original: Callable[..., Any], core: Core, calls: Counter[str]) -> Callable[..., Any]:
    """The replacement for transformers' `mamba_selective_scan`, of the same signature.

    Args:
        original: takes the calls that ask for the last state (generation). core: does the others.
        calls: counts the calls that `core` did, under "scan".
    """

    def scan(
        hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
        z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
        return_last_state: bool = False, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """hidden_states, dt, z (b, D, L), A (D, N), B, C (b, N, L), D, delta_bias (D) -> (b, D, L)."""
        if return_last_state:
            return original(
                hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, **kwargs
            )
        calls["scan"] += 1
        if delta_bias is not None:
            dt = dt + delta_bias[:, None]
        if delta_softplus:
            dt = F.softplus(dt)
        rows = (x.transpose(1, 2) for x in (hidden_states, dt))
        y = _Scan.apply(core, *rows, A, B.transpose(1, 2), C.transpose(1, 2)).transpose(1, 2)
        if D is not None:
            y = torch.addcmul(y, hidden_states, D[:, None])
        return y if z is None else y * F.silu(z)

    return scan


def causal_conv1d(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """The replacement for transformers' `causal_conv1d_fn`: shifted products, in float32 and without cuDNN.

    Args:
        hidden_states: (b, D, L). weight: (D, K). bias: (D). Returns (b, D, L).
    """
    length, width = hidden_states.shape[-1], weight.shape[-1]
    padded = F.pad(hidden_states.transpose(1, 2), (0, 0, width - 1, 0))
    out = torch.zeros_like(weight[:, 0]) if bias is None else bias
    for k in range(width):
        out = torch.addcmul(out, padded[:, k : k + length], weight[:, k])
    if activation not in (None, "silu"):
        raise ValueError(f"the fast convolution knows no activation {activation!r}; use hidden_act = 'silu'")
    return (F.silu(out) if activation else out).transpose(1, 2)


@contextmanager
def fast_mixers(modeling: ModuleType, core: Core) -> Iterator[Counter[str]]:
    """Inside, the mixers of a modeling file of transformers use the functions above. Yields a count of scans.

    Their forward looks the two functions up in its module when it runs, with or without the decorators that
    put kernels from the hub there, so the module's names are what is replaced.
    """
    saved = {name: getattr(modeling, name) for name in ("mamba_selective_scan", "causal_conv1d_fn")}
    calls: Counter[str] = Counter()
    try:
        modeling.mamba_selective_scan = scan_like(saved["mamba_selective_scan"], core, calls)
        modeling.causal_conv1d_fn = causal_conv1d
        yield calls
    finally:
        for name, function in saved.items():
            setattr(modeling, name, function)


def _relative_errors(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: list[Tensor]
) -> float:
    """Largest difference of the outputs or of any gradient, over the largest value there."""
    results = []
    for function in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        weights = (
            torch.linspace(0, 100, out.numel(), device=out.device, dtype=out.dtype).view(out.shape).sin()
        )
        results.append([out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)])
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(*results, strict=True)]
    return float(torch.stack(errors).max())


def verify(modeling: ModuleType, core: Core, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Compare both replacements, forward and gradients, with the functions of transformers that they replace.

    Returns the relative error of each. Raises RuntimeError where one is above 2e-4 (1e-6 in float64).
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        # float32 values also in float64: transformers rounds B and its input to float32
        return torch.randn(*shape, generator=generator).to(device, dtype)

    b, channels, n, length, width = 2, 40, 16, 77, 4
    A = -torch.exp(random(channels, n))
    rows = [random(b, channels, length), random(b, channels, length), A, random(b, n, length)]
    rows += [random(b, n, length), random(channels), random(b, channels, length), random(channels)]
    taps = [random(b, channels, length), random(channels, width), random(channels)]
    scan, conv = modeling.mamba_selective_scan, modeling.causal_conv1d_fn
    fast_scan = scan_like(scan, core, Counter())
    errors = {
        "scan": _relative_errors(
            lambda *x: fast_scan(*x, delta_softplus=True), lambda *x: scan(*x, delta_softplus=True), rows
        ),
        "convolution": _relative_errors(
            lambda *x: causal_conv1d(*x, activation="silu"), lambda *x: conv(*x, activation="silu"), taps
        ),
    }
    limit = 2e-4 if dtype == torch.float32 else 1e-6
    if not all(error < limit for error in errors.values()):
        raise RuntimeError(f"the fast functions differ from those of transformers: {errors}, allowed {limit}")
    return errors
