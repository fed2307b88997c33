"""Compiles the kernels that cases need, many at a time, into Triton's cache on disk."""

from __future__ import annotations

import os

import torch

from ssm_dist.kernel_benchmark.cases import Case
from ssm_dist.kernels import backend

PROCESSES = 16


def precompile(cases: list[Case]) -> None:
    """Run each case once in a child of this process, which must not have used its GPU yet.

    Children share what this process has imported. Cases of one op are neighbours, for kernels that they have
    in common. What fails here fails again, and is heard, when it is measured.
    """
    if torch.cuda.is_initialized():
        return
    ordered = sorted(cases, key=lambda c: (c.op, c.tokens, c.sequences))
    count = min(PROCESSES, os.cpu_count() or 1, len(ordered))
    children = []
    for part in range(count):
        child = os.fork()
        if not child:
            _run(ordered[part * len(ordered) // count : (part + 1) * len(ordered) // count])
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def _run(cases: list[Case]) -> None:
    """All of them, as far as they go; does not return."""
    try:
        device = torch.device("cuda")
        backend.select("triton", device)
        for case in cases:
            case.run(case.make(device))
        torch.cuda.synchronize()
    finally:
        os._exit(0)
