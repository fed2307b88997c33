"""What the tests of reductions run on ranks with GPUs; without slow imports."""

from __future__ import annotations

import random
import time

import torch
import torch.distributed as dist
from torch import Tensor

from ssm_dist.kernels import backend
from ssm_dist.kernels.codecs import decode_rows, encode_rows, sum_rows
from ssm_dist.kernels.norm import add_rms_norm_reference
from ssm_dist.parallel import TensorParallel
from ssm_dist.parallel.collectives import (
    RankFailure,
    Reductions,
    carrier,
    register_group,
    tp_all_reduce,
    tp_all_reduce_add_rms_norm,
    tp_all_reduce_add_rms_norm_split,
    wait_for_device,
)
from ssm_dist.parallel.collectives.groups import group_named
from tests.parallel.reductions_on_ranks import Case

WIDTH, TOKENS = 4096, 4096
"""What the shared memory is opened for."""

SHORT = ("one_shot", "two_shot")


_ready: dict[dist.ProcessGroup, tuple[TensorParallel, torch.device]] = {}


def ready() -> tuple[TensorParallel, torch.device]:
    """This rank, its GPU, Triton's kernels, and shared memory, opened once."""
    if dist.group.WORLD not in _ready:
        _ready[dist.group.WORLD] = _join()
    return _ready[dist.group.WORLD]


def _join() -> tuple[TensorParallel, torch.device]:
    device = torch.device("cuda", dist.get_rank())
    backend.select("triton", device)
    tp = TensorParallel.over_all_ranks("cuda", Reductions(timeout_seconds=20.0))
    tp.share_memory(TOKENS, WIDTH, torch.bfloat16, device)
    return tp, device


def peer_access() -> str:
    """What carries the sums."""
    return carrier(ready()[0].group)


def sums(cases: list[Case]) -> list[Tensor]:
    """The outputs of the cases, on the CPU."""
    tp, device = ready()
    outputs = []
    for case in cases:
        x = case.part(tp.rank).to(device)
        y = tp_all_reduce(x, tp.group, case.codec, case.group_size, case.algorithm)
        wait_for_device(tp.group, device)
        outputs.append(y.cpu())
    return outputs


def norms(case: Case, split: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and the stream (split: this rank's rows of it), and what float64 makes of the parts (exact codec)."""
    tp, device = ready()
    generator = torch.Generator().manual_seed(7)
    residual = torch.randn(case.rows, case.width, generator=generator)
    weight = torch.randn(case.width, generator=generator).to(case.dtype)
    whole = torch.stack([case.part(rank).double() for rank in range(tp.degree)]).sum(0)
    y, stream = add_rms_norm_reference(whole, residual.double(), weight.double(), 1e-5)
    args = (case.part(tp.rank).to(device), residual.to(device), weight.to(device), 1e-5, tp.group)
    how = (case.codec, case.group_size, case.algorithm)
    if split:
        got = tp_all_reduce_add_rms_norm_split(*args, tp.degree, *how)
        stripe = len(got[1])
        stream = stream[tp.rank * stripe :][:stripe]
        got = got[0], got[1][: len(stream)]
    else:
        got = tp_all_reduce_add_rms_norm(*args, *how)
    wait_for_device(tp.group, device)
    return got[0].cpu(), got[1].cpu(), y, stream


def codec_bits(codec: str, group_size: int, rows: int, width: int, dtype: torch.dtype) -> list[str]:
    """Where the Triton codecs differ from the definitions, on this GPU."""
    device = torch.device("cuda", dist.get_rank())
    torch.manual_seed(1)
    x = torch.randn(3, rows, width, device=device) * 10.0 ** torch.linspace(-6, 4, width, device=device)
    x[1] = (127 * torch.rand(rows, width, device=device)).round() / 2
    x[2, 0, 0] = torch.nan
    x = x.to(dtype)
    layout = (width, dtype, codec, group_size)

    def results(name: str) -> dict[str, Tensor]:
        with backend.using(name, device):
            parts = torch.stack([encode_rows(part, codec, group_size, rows) for part in x])
            decoded = torch.stack([decode_rows(part, *layout) for part in parts])
            return {"decoded": decoded, "sum": decode_rows(sum_rows(parts, *layout), *layout)}

    ours, theirs = results("triton"), results("reference")
    return [
        f"{name}: {int((ours[name] != theirs[name]).sum())} of {ours[name].numel()}"
        for name in ours
        if not torch.equal(ours[name].nan_to_num(nan=1e30), theirs[name].nan_to_num(nan=1e30))
    ]


def replays(algorithm: str, codec: str, rows: int, times: int) -> int:
    """Replays of a graph with a sum and a norm and new inputs; how often it differed from plain calls."""
    tp, device = ready()
    x = torch.empty(rows, 2560, dtype=torch.bfloat16, device=device)
    residual, weight = torch.zeros(rows, 2560, device=device), torch.ones(2560, dtype=x.dtype, device=device)

    def step() -> tuple[Tensor, Tensor]:
        total = tp_all_reduce(x, tp.group, codec, 128, algorithm)
        y, _ = tp_all_reduce_add_rms_norm(x, residual, weight, 1e-5, tp.group, codec, 128, algorithm)
        return total, y

    x.normal_()
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = step()
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for replay in range(times):
        torch.manual_seed(1000 * replay + tp.rank)
        x.normal_()
        graph.replay()
        kept = [t.clone() for t in captured]
        for got, again in zip(kept, step(), strict=True):  # the same call without a graph
            wrong += (got != again).any()
    wait_for_device(tp.group, device)
    return int(wrong)


def skewed(calls: int) -> int:
    """Calls of changing sizes and algorithms with ranks out of step; how many sums were wrong."""
    tp, device = ready()
    choice, own = random.Random(3), random.Random(tp.rank)
    shapes = [(1, 2560), (1, 192), (7, 2560), (64, 2560), (200, 4096), (1, 4096)]
    ramp = torch.arange(4096, device=device, dtype=torch.bfloat16) % 13
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for call in range(calls):
        rows, width = choice.choice(shapes)
        algorithm = choice.choice([*SHORT, *SHORT, "bulk"])
        x = (ramp[:width] + call % 5 + tp.rank).expand(rows, width).contiguous()
        total = tp_all_reduce(x, tp.group, "none", 128, algorithm)
        ranks = tp.degree
        expected = ranks * (ramp[:width] + call % 5).float() + ranks * (ranks - 1) / 2
        wrong += (total.float() != expected).any()
        if own.random() < 0.01:
            time.sleep(own.random() * 0.003)
        if own.random() < 0.02:
            torch.cuda._sleep(int(own.random() * 300_000))
    wait_for_device(tp.group, device)
    return int(wrong)


def alone(absent: int, algorithm: str) -> str:
    """What the others are told when one rank stays away; in a group of its own, whose memory is then lost."""
    tp, device = ready()
    name = register_group(f"impatient {algorithm}", tp.mesh.get_group(), 2.0)
    from ssm_dist.parallel.collectives.shared import open_shared_memory

    open_shared_memory(name, 2 * WIDTH, 2 * WIDTH * 64, device)
    x = torch.ones(16, 2560, dtype=torch.bfloat16, device=device)
    tp_all_reduce(x, name, "none", 128, algorithm)
    wait_for_device(name, device)
    if tp.rank == absent:
        time.sleep(12.0)
        return ""
    tp_all_reduce(x, name, "none", 128, algorithm)
    try:
        wait_for_device(name, device)
    except RankFailure as error:
        return str(error)
    return "no error"


def fallback() -> tuple[str, Tensor]:
    """A sum whose shape no push can serve, and one of a dtype that no kernel takes."""
    tp, device = ready()
    odd = tp_all_reduce(torch.full((3, 37), tp.rank + 1.0, device=device), tp.group, "none", 128, "one_shot")
    wide = tp_all_reduce(torch.ones(2, 5, dtype=torch.float64, device=device), tp.group)
    wait_for_device(tp.group, device)
    assert group_named(tp.group).memory is not None
    return carrier(tp.group), torch.cat([odd.flatten().double(), wide.flatten()]).cpu()
