"""What a rank will need of memory, and whether it is there, before anything is allocated.

Weights, states and pages are exact. Activations are an upper bound for one step, whose largest tensors are
counted as the reference ops hold them; fused kernels hold less. For T tokens (a prefill chunk, or one token
of every sequence when decoding), with b bytes a number in the model's dtype, D channels, H hidden units, N
states a channel, A = heads * head_dim of attention and M hidden units of the MLP, it is

    stream   T * H * (3 b + 16)      normed input, branch, its reduction; residual, three float32 temporaries;
             with error feedback on R ranks, 2 (1 + 1 / R) b more: errors of parts and of sums, before and
             after; half as much again for Zamba, of a norm that is not of the stream alone

and the largest of what lives beside it at different times:

    mixer    T * D * (6 b + 16)      x, z, convolved x, dt, y, one copy; four float32 temporaries, and
             10 * max(TIME_BLOCK, sequences) * D * N * 4     float32 states of a block, or of a decode step
    block    T * (H * (2 b + 36) + 4 b (A + M))     Zamba's shared block, on the embeddings and the stream
    logits   sequences * vocabulary * 48     gathered, in float32, and sorted with their indices

Captured steps hold theirs in a pool of their own, beside those of steps not captured yet: twice that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ssm_dist.checkpoint.weights import parameter_dtype
from ssm_dist.errors import UserError
from ssm_dist.kernels.scan import TIME_BLOCK
from ssm_dist.models.batch import StateShapes
from ssm_dist.models.language_model import LanguageModelConfig
from ssm_dist.models.zamba import ZambaConfig
from ssm_dist.parallel import ParameterPlacement
from ssm_dist.state_sizes import state_need

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes on one rank."""

    weights: int
    states: int
    kv_pages: int
    activations: int

    @property
    def total(self) -> int:
        """Everything together."""
        return self.weights + self.states + self.kv_pages + self.activations


def estimate(
    config: LanguageModelConfig,
    shapes: StateShapes,
    placements: Sequence[ParameterPlacement],
    *,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    max_sequences: int,
    max_tokens: int,
    chunk_tokens: int,
    prefix_bytes: int = 0,
    captured: bool = False,
    feedback: bool = False,
) -> MemoryNeed:
    """What a rank needs to run a model, with [cache] and [prefill] settings of these names.

    shapes: of the whole model, as `state_shapes()` gives them before it is sharded; placements: of all its
    parameters, from the resolved plan. captured: steps may be captured in CUDA graphs. feedback:
    reductions feed errors back.
    """
    degree = placements[0].degree
    mine = replace(
        shapes,
        conv=(shapes.conv[0], shapes.conv[1] // degree),
        ssm=(shapes.ssm[0] // degree, shapes.ssm[1]),
        kv=(shapes.kv[0] // degree, shapes.kv[1]),
    )
    states = state_need(mine, max_sequences, max_tokens, dtype, state_dtype)
    return MemoryNeed(
        weights=_weight_bytes(placements, dtype, config.tied_head),
        states=states.slots + prefix_bytes,
        kv_pages=states.kv_pages,
        activations=_activation_bytes(config, degree, dtype.itemsize, max_sequences, chunk_tokens, feedback)
        * (2 if captured else 1),
    )


def require_memory(
    need: MemoryNeed,
    device: torch.device,
    *,
    ranks_here: int = 1,
    minimum: Callable[[int], int] = lambda free: free,
) -> None:
    """Raise UserError, with the parts and what to change, if a rank of this device has less free than `need`.

    ranks_here: ranks that share this host's memory. `minimum` takes the least over all ranks, so that all
    raise or none. On a host that does not tell what is free, nothing is refused.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _host_free() // ranks_here
    free = minimum(free)
    if need.total > free:
        raise UserError(_explanation(need, free))


def _weight_bytes(placements: Sequence[ParameterPlacement], dtype: torch.dtype, tied_head: bool) -> int:
    held = [p for p in placements if not (tied_head and p.path == "head.weight")]
    return sum(torch.Size(p.local_shape).numel() * parameter_dtype(p.path, dtype).itemsize for p in held)


def _activation_bytes(
    config: LanguageModelConfig, degree: int, itemsize: int, sequences: int, chunk_tokens: int, feedback: bool
) -> int:
    """The upper bound that the head of this file states."""
    tokens = max(chunk_tokens, sequences)
    channels, hidden = config.d_inner // degree, config.d_model
    stream = tokens * hidden * (3 * itemsize + 16)
    if feedback:
        errors = 3 if isinstance(config, ZambaConfig) else 2
        stream += errors * (tokens + -(-tokens // degree)) * hidden * itemsize
    mixer = tokens * channels * (6 * itemsize + 16)
    mixer += 10 * max(TIME_BLOCK, sequences) * channels * config.d_state * 4
    block = 0
    if isinstance(config, ZambaConfig):
        heads = config.attention_heads * config.attention_head_dim // degree
        block = tokens * (hidden * (2 * itemsize + 36) + 4 * itemsize * (heads + config.d_mlp // degree))
    return stream + max(mixer, block, sequences * config.vocab_rows * 48)


def _host_free() -> int:
    """Bytes that processes on this host may still take: of the machine's, or of the container's if less."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if not limit.exists() or limit.read_text().strip() == "max":
        return available
    stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    reclaimable = int(stat["inactive_file"]) + int(stat["active_file"])  # the page cache gives way
    return min(available, int(limit.read_text()) - int(used.read_text()) + reclaimable)


def _explanation(need: MemoryNeed, free: int) -> str:
    parts = [
        ("weights", need.weights, "less with a higher [parallel] tensor"),
        ("states", need.states, "less with fewer [cache] max_sequences or prefix_device_bytes"),
        ("keys and values", need.kv_pages, "less with fewer [cache] max_tokens"),
        ("activations of a step", need.activations, "less with fewer [prefill] chunk_tokens"),
    ]
    table = [f"  {name:22}{size / 2**30:8.2f} GiB   {advice}" for name, size, advice in parts if size]
    title = f"a rank needs {need.total / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free"
    return "\n".join([f"The model does not fit: {title}.", *table])
