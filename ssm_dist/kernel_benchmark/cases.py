"""What the kernel benchmark measures: each op at the shapes of the released models, its work, and its peers.

A case counts the fewest bytes that its op must move through device memory (each input read once, each output
written once), the operations of the tensor cores, and those of the special-function unit (exp, rcp, lg2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ssm_dist import kernels
from ssm_dist.models.language_model import LanguageModelConfig
from ssm_dist.models.zamba import ZambaConfig
from ssm_dist.registry import preset

PREFILLS = ((1, 2048), (1, 8192), (1, 32768), (8, 2048), (8, 8192))
"""(sequences, tokens of each)."""
DECODES = (1, 64, 256)
"""Sequences."""
ROWS = (1, 64, 256, 16384)
"""Of the norms."""
FEW_ROWS = (1, 4, 16, 64)
"""Of linear layers."""
FEW_SEQUENCES = (1, 4)
ATTENTIONS = ((1, 1), (64, 1), (1, 2048))
"""(sequences, new tokens of each)."""
CONTEXT = 4096
"""Tokens that attention finds in its pages."""
PAGE = 16
HALF, WIDE = 2, 4
"""Bytes of an activation and of a state number."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one shape. `make(device)` gives fresh random arguments of `run`."""

    op: str
    model: str
    degree: int
    sequences: int
    tokens: int
    width: int
    """Channels, or what else the op's rows hold."""
    make: Callable[[torch.device], list[Any]]
    bytes: int
    flops: int = 0
    special: int = 0

    def run(self, arguments: list[Any]) -> Any:
        """The public function, in the backend that is selected."""
        return getattr(kernels, self.op)(*arguments)


def cases(models: list[str], degrees: list[int]) -> Iterator[Case]:
    """All cases of these presets at these tensor-parallel degrees."""
    for model in models:
        config = preset(model)[1]
        for degree in degrees:
            if config.d_inner % degree:
                continue
            sizes = _Sizes(model, degree, config.d_inner // degree, config.d_state, config.conv_width,
                           _groups(config, degree))  # fmt: skip
            for sequences, tokens in PREFILLS:
                yield _conv(sizes, sequences, tokens)
                yield _scan(sizes, sequences, tokens)
            for sequences in DECODES:
                yield _conv(sizes, sequences, 1)
                yield _scan(sizes, sequences, 1)
            for sequences in FEW_SEQUENCES:
                yield _projected(sizes, config.dt_rank, sequences)
                if sizes.groups > 1:
                    yield _project_heads(sizes, config.dt_rank, sequences)
            if degree == 1:
                yield from (_largest(model, config.vocab_size, sequences) for sequences in DECODES)
                yield from (_last(op, model, sequences) for op in ("load", "store") for sequences in DECODES)
            for columns, width in linear_layers(config, degree):
                yield from (_linear(model, degree, columns, width, rows) for rows in FEW_ROWS)
            if degree == 1:
                yield from (_add_norm(model, config.d_model, rows) for rows in ROWS)
            if getattr(config, "mixer_rms_eps", None) and degree == 1:
                yield from (_normalize(model, config.dt_rank, rows) for rows in ROWS)
            if isinstance(config, ZambaConfig):
                heads, size = config.attention_heads // degree, config.attention_head_dim
                yield from (_gated_gelu(model, degree, config.d_mlp // degree, rows) for rows in ROWS)
                yield from (_attention(model, degree, heads, size, *shape) for shape in ATTENTIONS)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    model: str
    degree: int
    channels: int
    states: int
    taps: int
    groups: int


def _groups(config: Any, degree: int) -> int:
    """Heads of channels that a rank holds, at least a part of one."""
    return max(1, getattr(config, "heads", 1) // degree)


def _offsets(sequences: int, tokens: int, device: torch.device) -> Tensor:
    return torch.arange(sequences + 1, device=device, dtype=torch.int32) * tokens


def _normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def _slots(sequences: int, device: torch.device) -> Tensor:
    return torch.randperm(sequences, device=device).int()


def _conv(sizes: _Sizes, sequences: int, tokens: int) -> Case:
    channels, taps, rows, update = sizes.channels, sizes.taps, sequences * tokens, tokens == 1

    def make(device: torch.device) -> list[Any]:
        x = _normal(rows, 2 * channels, device=device)[:, :channels]
        state = _normal(sequences, taps - 1, channels, device=device)
        weights = [_normal(channels, taps, device=device), _normal(channels, device=device)]
        offsets = [] if update else [_offsets(sequences, tokens, device)]
        return [x, *weights, state, *offsets, _slots(sequences, device)]

    moved = HALF * channels * (2 * rows + 2 * sequences * (taps - 1) + taps + 1)
    op = "causal_conv_update" if update else "causal_conv"
    return Case(
        op, sizes.model, sizes.degree, sequences, tokens, channels, make, moved, 0, 2 * rows * channels
    )


def _scan(sizes: _Sizes, sequences: int, tokens: int) -> Case:
    channels, states, groups, rows, update = (
        sizes.channels, sizes.states, sizes.groups, sequences * tokens, tokens == 1,
    )  # fmt: skip

    def make(device: torch.device) -> list[Any]:
        x, dt = (_normal(rows, channels, device=device) for _ in range(2))
        z = _normal(rows, 2 * channels, device=device)[:, channels:]
        B, C = _normal(rows, groups, 2 * states + 8, device=device)[..., 8:].chunk(2, -1)
        A_log = torch.arange(1, states + 1, device=device).float().log().expand(channels, -1).contiguous()
        D, bias = (_normal(channels, device=device, dtype=torch.float32) for _ in range(2))
        state = _normal(sequences, channels, states, device=device, dtype=torch.float32)
        offsets = [] if update else [_offsets(sequences, tokens, device)]
        return [x, dt, A_log, B, C, D, z, bias - 4, state, *offsets, _slots(sequences, device)]

    moved = rows * HALF * (4 * channels + 2 * groups * states) + WIDE * channels * (
        states * (2 * sequences + 1) + 2
    )
    op = "selective_state_update" if update else "selective_scan"
    special = rows * channels * (states + 4)
    return Case(op, sizes.model, sizes.degree, sequences, tokens, channels, make, moved, 0, special)


def _project_heads(sizes: _Sizes, rank: int, sequences: int) -> Case:
    channels, outputs = sizes.channels, rank + 2 * sizes.states

    def make(device: torch.device) -> list[Any]:
        weight = _normal(outputs, channels, device=device).T
        return [_normal(sequences, channels, device=device), weight, sizes.groups]

    moved = HALF * (outputs * (channels + sequences * sizes.groups) + sequences * channels)
    return Case("project_heads", sizes.model, sizes.degree, sequences, 1, channels, make, moved)


def _projected(sizes: _Sizes, rank: int, sequences: int) -> Case:
    update = _scan(sizes, sequences, 1)

    def make(device: torch.device) -> list[Any]:
        x, _, A_log, _, _, D, z, bias, state, slots = update.make(device)
        given = _normal(sequences, sizes.groups, rank + 2 * sizes.states, device=device)
        return [x, given, _normal(sizes.channels, rank, device=device), A_log, D, z, bias, state, slots]

    moved = update.bytes + HALF * (sizes.channels * (rank - sequences) + sequences * sizes.groups * rank)
    return dataclasses.replace(update, op="projected_state_update", make=make, bytes=moved)


def _add_norm(model: str, width: int, rows: int) -> Case:
    def make(device: torch.device) -> list[Any]:
        residual = _normal(rows, width, device=device, dtype=torch.float32)
        return [_normal(rows, width, device=device), residual, _normal(width, device=device), 1e-5]

    moved = width * (rows * 2 * (HALF + WIDE) + HALF)
    return Case("add_rms_norm", model, 1, rows, 1, width, make, moved)


def linear_layers(config: LanguageModelConfig, degree: int) -> Iterator[tuple[int, int]]:
    """(outputs, inputs) that a rank holds of in_proj, out_proj, x_proj (of one head) and the head."""
    channels = config.d_inner // degree
    yield 2 * channels, config.d_model
    yield config.d_model, channels
    if _groups(config, degree) == 1:
        yield config.dt_rank + 2 * config.d_state, channels
    yield config.vocab_rows // degree, config.d_model


def _linear(model: str, degree: int, columns: int, width: int, rows: int) -> Case:
    def make(device: torch.device) -> list[Any]:
        return [_normal(rows, width, device=device), _normal(columns, width, device=device)]

    moved = HALF * (columns * width + rows * (columns + width))
    return Case("linear", model, degree, rows, 1, columns, make, moved, 2 * rows * columns * width)


def _largest(model: str, width: int, rows: int) -> Case:
    def make(device: torch.device) -> list[Any]:
        return [_normal(rows, width, device=device)]

    return Case("largest", model, 1, rows, 1, width, make, rows * (HALF * width + HALF + 8))


def _last(op: str, model: str, sequences: int) -> Case:
    """Loading, or storing, last tokens and places of all slots."""

    def make(device: torch.device) -> list[Any]:
        numbers = torch.arange(5 * sequences, device=device).view(5, -1)
        return [*numbers[:3] % sequences] if op == "load" else [*numbers % sequences, sequences]

    moved = sequences * (52 if op == "load" else 40)
    return Case(f"{op}_last", model, 1, sequences, 1, 1, make, moved)


def _normalize(model: str, width: int, rows: int) -> Case:
    def make(device: torch.device) -> list[Any]:
        return [_normal(rows, width + 32, device=device)[:, :width], 1e-6]

    return Case("rms_normalize", model, 1, rows, 1, width, make, 2 * HALF * rows * width)


def _gated_gelu(model: str, degree: int, width: int, rows: int) -> Case:
    def make(device: torch.device) -> list[Any]:
        return [_normal(rows, width, device=device) for _ in range(2)]

    return Case("gated_gelu", model, degree, rows, 1, width, make, 3 * HALF * rows * width)


def _attention(model: str, degree: int, heads: int, size: int, sequences: int, tokens: int) -> Case:
    """New tokens at the end of contexts of CONTEXT tokens."""
    rows, width = sequences * tokens, heads * size
    table = CONTEXT // PAGE

    def make(device: torch.device) -> list[Any]:
        new = [_normal(rows, heads, size, device=device) for _ in range(3)]
        pages = torch.randperm(sequences * table, device=device).int().view(sequences, table)
        stored = [_normal(sequences * table, PAGE, heads, size, device=device) for _ in range(2)]
        positions = torch.arange(CONTEXT - tokens, CONTEXT, device=device).repeat(sequences)
        offsets = _offsets(sequences, tokens, device)
        return [*new, *stored, offsets, positions, pages, (size / 2) ** -0.5]

    moved = HALF * width * (2 * sequences * CONTEXT + 4 * rows)
    seen = CONTEXT - (tokens - 1) / 2
    flops = int(4 * rows * width * seen) if tokens > 1 else 0
    return Case("paged_attention", model, degree, sequences, tokens, width, make, moved, flops)
