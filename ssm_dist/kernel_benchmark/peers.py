"""torch's, mamba-ssm's and causal-conv1d's kernels on the arguments of our ops, for the kernel benchmark.

They get what suits them: their layouts, A instead of A_log, fresh states, no slots where they take none. All
of that is made before the clock starts. Where one has two layouts, both are offered and the faster counts.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

Call = Callable[[], Any]
Peer = Callable[..., Call]
"""Takes the op's arguments and returns the call to time."""


def installed_peers() -> dict[str, dict[str, Peer]]:
    """Op -> name -> peer, of what is installed; logs what is not."""
    peers: dict[str, dict[str, Peer]] = {
        "linear": {"torch": lambda x, weight: functools.partial(F.linear, x, weight)}
    }
    for package, offer in (("causal_conv1d", _causal_conv1d), ("mamba_ssm", _mamba_ssm)):
        try:
            found = offer()
        except Exception as error:
            logger.info("%s is left out: %s: %s", package, type(error).__name__, error)
            continue
        for op, by_name in found.items():
            peers.setdefault(op, {}).update(by_name)
    return peers


def _causal_conv1d() -> dict[str, dict[str, Peer]]:
    package = importlib.import_module("causal_conv1d")
    conv, update = package.causal_conv1d_fn, package.causal_conv1d_update

    def channel_last(
        x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, seq_offsets: Tensor, slots: Tensor
    ) -> Call:
        # as torch's conv1d wants it, (batch, channels, tokens), but with neighbouring channels in memory
        mine = x.unflatten(0, (slots.shape[0], -1)).transpose(1, 2)
        final = torch.empty_like(state).transpose(1, 2)
        return lambda: conv(mine, weight, bias, None, state.transpose(1, 2), True, final, "silu")

    def token_last(
        x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, seq_offsets: Tensor, slots: Tensor
    ) -> Call:
        mine = x.unflatten(0, (slots.shape[0], -1)).transpose(1, 2).contiguous()
        return lambda: conv(mine, weight, bias, activation="silu")

    def by_slots(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, slots: Tensor) -> Call:
        mine = state.transpose(1, 2).contiguous()
        return lambda: update(x, mine, weight, bias, "silu", conv_state_indices=slots)

    return {
        "causal_conv": {
            "causal-conv1d, channels last": channel_last,
            "causal-conv1d, tokens last": token_last,
        },
        "causal_conv_update": {"causal-conv1d": by_slots},
    }


def _mamba_ssm() -> dict[str, dict[str, Peer]]:
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    update = importlib.import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update

    def whole(
        x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
        state: Tensor, seq_offsets: Tensor, slots: Tensor,
    ) -> Call:  # fmt: skip
        rows = [t.unflatten(0, (slots.shape[0], -1)) for t in (x, dt, z)]
        u, delta, gate = (t.transpose(1, 2).contiguous() for t in rows)
        groups = [t.unflatten(0, (slots.shape[0], -1)).permute(0, 2, 3, 1).contiguous() for t in (B, C)]
        A = -A_log.exp()
        return lambda: scan(u, delta, A, *groups, D, gate, dt_bias, True, True)

    def by_slots(
        x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
        state: Tensor, slots: Tensor,
    ) -> Call:  # fmt: skip
        heads = (B.shape[1], -1)
        rows = [t.unflatten(1, heads) for t in (x, dt)]
        A, mine = -A_log.exp().unflatten(0, heads), state.unflatten(1, heads)
        skip, gate, bias = D.unflatten(0, heads), z.unflatten(1, heads), dt_bias.unflatten(0, heads)
        return lambda: update(mine, *rows, A, B, C, skip, gate, bias, True, slots)

    return {"selective_scan": {"mamba-ssm": whole}, "selective_state_update": {"mamba-ssm": by_slots}}
