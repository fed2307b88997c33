"""The ranks that share a model."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ssm_dist.errors import UserError
from ssm_dist.parallel.collectives import EXACT, Reductions, register_group
from ssm_dist.parallel.collectives.groups import group_named


@dataclass(frozen=True)
class TensorParallel:
    """One tensor-parallel group as seen from one of its ranks; what styles need in order to communicate."""

    mesh: DeviceMesh
    """One-dimensional, its dimension named "tp"."""
    rank: int
    degree: int
    group: str
    """Name of the group of all ranks, as `collectives` knows it."""
    reductions: Reductions = EXACT
    """How sums travel, by kind."""

    @classmethod
    def over_all_ranks(cls, device_type: str, reductions: Reductions = EXACT) -> TensorParallel:
        """The group of all ranks, which join here unless their process group is there already.

        They are those that torchrun started: over NCCL, each with its GPU ("cuda"), or gloo ("cpu"). Raises
        `UserError` in a process that torchrun did not start.
        """
        if not dist.is_initialized():
            _join_ranks(device_type)
        degree = dist.get_world_size()
        mesh = init_device_mesh(device_type, (degree,), mesh_dim_names=("tp",))
        name = register_group(f"tp{degree}", mesh.get_group(), reductions.timeout_seconds)
        return cls(mesh, mesh.get_local_rank(), degree, name, reductions)

    def subgroup(self, span: int) -> str:
        """Name of this rank's group of `span` neighbouring ranks; all ranks must ask alike.

        Groups are made once: NCCL communicators cost memory and time.
        """
        if span == self.degree:
            return self.group
        name = f"{self.group}/{span}"
        if span not in _subgroups.setdefault(self.mesh, {}):
            group, _ = dist.new_subgroups(group_size=span, group=self.mesh.get_group())
            _subgroups[self.mesh][span] = register_group(name, group)
        return self._patient(name)

    def host_group(self) -> str:
        """Name of a group of all ranks whose messages stay in host memory; all ranks must ask alike.

        What the hosts tell each other must not wait for the GPUs, as messages over NCCL do.
        """
        if dist.get_backend(self.mesh.get_group()) == "gloo":
            return self.group
        name = f"{self.group}/host"
        if self.mesh not in _host_groups:
            ranks = dist.get_process_group_ranks(self.mesh.get_group())
            group = dist.new_group(ranks, backend="gloo")
            _host_groups[self.mesh] = register_group(name, group)
        return self._patient(name)

    def _patient(self, name: str) -> str:
        """The group of that name; even if an earlier model made it, it waits as long as this one says."""
        group_named(name).timeout_seconds = self.reductions.timeout_seconds
        return name

    def share_memory(self, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        """Let the GPUs of every group share memory, for sums of up to `tokens` rows of `width` numbers.

        Before anything is captured in a CUDA graph; all ranks alike. Where they cannot, NCCL stays.
        """
        from ssm_dist.parallel.collectives.shared import open_shared_memory  # a CPU needs no Triton

        row_bytes = width * dtype.itemsize
        for name in (self.group, *_subgroups.get(self.mesh, {}).values()):
            open_shared_memory(name, row_bytes, tokens * row_bytes, device)


def _join_ranks(device_type: str) -> None:
    if "RANK" not in os.environ:
        raise UserError(
            "this is 1 process without ranks; start it with "
            f"`torchrun --standalone --nproc-per-node 2 {sys.argv[0] or 'SCRIPT.py'}`"
        )
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")


_subgroups: dict[DeviceMesh, dict[int, str]] = {}
_host_groups: dict[DeviceMesh, str] = {}
