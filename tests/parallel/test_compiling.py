"""Kernels compiled before they are needed; the GPU tests of reductions depend on it."""

from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import JITFunction

from ssm_dist.parallel.collectives import tp_linear_all_reduce, tp_linear_all_reduce_add_rms_norm
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_that_are_summed_look_alike_while_compiling(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        x, weight, scale = (torch.empty(*shape, dtype=dtype) for shape in ((2, 8), (16, 8), (16,)))
        total = tp_linear_all_reduce(x, weight, "any")
        normed, stream = tp_linear_all_reduce_add_rms_norm(x, weight, None, scale, 1e-5, "any")
    assert normed is not stream, "results of operators are tensors of their own"
    assert total.shape == normed.shape == stream.shape == (2, 16)
    assert (total.dtype, normed.dtype, stream.dtype) == (dtype, dtype, torch.float32)
