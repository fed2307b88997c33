"""Kernels compiled before they are needed; the GPU tests of reductions depend on it."""

from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from ssm_dist.parallel.collectives.compiling import compile_only, group_without_others
from ssm_dist.parallel.collectives.groups import group_named


def test_inside_nothing_runs_and_afterwards_everything_does() -> None:
    launches = []
    with mock.patch.object(JITFunction, "run", lambda kernel, *args, **options: launches.append(options)):
        with compile_only():
            JITFunction.run(None, 1, grid=(1,), warmup=False)
        JITFunction.run(None, 1, grid=(1,), warmup=False)
    assert [options["warmup"] for options in launches] == [True, False]


def test_a_group_without_others_serves_what_a_shared_one_would() -> None:
    group = group_named(group_without_others(4, 512, 2**20, torch.device("cpu")))
    assert group.size == 4 and group.memory is not None
    x = torch.empty(100, 256, dtype=torch.bfloat16)
    assert group.memory.fits("two_shot", x, "none", 128, with_norm=True)
    assert group.memory.fits_in_one_block(x, "int8", 128)
