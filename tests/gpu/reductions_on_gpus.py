"""What the tests of reductions run on ranks with GPUs; without slow imports.

Every rank checks on its own GPU what it can, and returns what it found.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ssm_dist.kernels import add_rms_norm, backend, linear
from ssm_dist.kernels.codecs import decode_rows, encode_rows, sum_rows
from ssm_dist.kernels.norm import add_rms_norm_reference
from ssm_dist.parallel import TensorParallel
from ssm_dist.parallel.collectives import (
    RankFailure,
    Reductions,
    Wire,
    carrier,
    failures,
    pushes_product,
    register_group,
    tp_all_reduce,
    tp_all_reduce_add_rms_norm,
    tp_all_reduce_add_rms_norm_split,
    tp_linear_all_reduce,
    tp_linear_all_reduce_add_rms_norm,
    wait_for_device,
)
from tests.kernels.codec_bounds import reduction_bound
from tests.kernels.playing_ranks import words_a_program
from tests.parallel.feedback_on_ranks import wrong_sums
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


def compile_share(degree: int, cases: list[tuple[str, Case]]) -> None:
    """Compile this worker's share of the kernels that `degree` ranks need; workers are not those ranks.

    A case is a "sum", a "norm" or a "split" norm.
    """
    from ssm_dist.parallel.collectives.compiling import compile_only, compile_sum, group_without_others

    worker, workers = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", worker % torch.cuda.device_count())
    torch.cuda.set_device(device)
    backend.select("triton", device)
    group = group_without_others(degree, 2 * WIDTH, 2 * WIDTH * TOKENS, device)
    with compile_only():
        for kind, case in cases[worker::workers]:
            x = torch.empty(case.rows, case.width, dtype=case.dtype, device=device)
            how = (case.codec, case.group_size, case.algorithm)
            if kind == "sum":
                compile_sum(x, group, degree, *how)
                continue
            args = (x, x.float(), x[0].clone(), 1e-5, group)
            if kind == "split":
                tp_all_reduce_add_rms_norm_split(*args, degree, *how)
            elif case.algorithm != "all_reduce":
                tp_all_reduce_add_rms_norm(*args, *how)
            add_rms_norm(*args[:4])


@dataclass(frozen=True)
class Verdict:
    """What a rank found of a sum."""

    same: bool
    """All ranks hold the same bits, of the right dtype."""
    excess: float
    """Largest error less its bound: at most 0."""
    misplaced: int
    """Numbers that are finite and should not be, or the other way round."""


def verdicts(cases: list[Case]) -> list[Verdict]:
    """Sums of the cases, checked."""
    tp, device = ready()
    found = []
    for case in cases:
        x = case.part(tp.rank, device)
        y = tp_all_reduce(x, tp.group, case.codec, case.group_size, case.algorithm)
        wait_for_device(tp.group, device)
        parts = torch.stack([case.part(rank, device) for rank in range(tp.degree)])
        found.append(_verdict(case, y, parts))
    return found


def _verdict(case: Case, y: Tensor, parts: Tensor) -> Verdict:
    same = y.dtype == case.dtype and same_bits(y)
    reach = 1 if case.codec == "none" else case.group_size
    lost = torch.zeros(y.shape, dtype=torch.bool, device=y.device)
    lost[-1, :reach] = case.kind in ("nan", "infinite")
    error = (y.double() - parts.double().sum(0)).abs()
    bound = reduction_bound(parts, case.codec, case.group_size, case.dtype)
    if case.codec == "none":  # NCCL and a two-shot round on the way
        bound = bound + len(parts) * torch.finfo(case.dtype).eps * parts.double().abs().sum(0)
    excess = float((error - bound)[~lost].max())
    return Verdict(same, excess, int((y.isfinite() == lost).sum()))


def same_bits(y: Tensor) -> bool:
    """Whether all ranks hold the same bits; any NaN is like another."""
    y = y.nan_to_num(nan=1e4).contiguous()
    everybodys = [torch.empty_like(y) for _ in range(dist.get_world_size())]
    dist.all_gather(everybodys, y)
    return all(torch.equal(other, y) for other in everybodys)


def exchanged_and_bulk(case: Case) -> bool:
    """Whether the long way over shared memory has the bits of the exchange."""
    tp, device = ready()
    x = case.part(tp.rank, device)
    ways = [tp_all_reduce(x, tp.group, case.codec, case.group_size, way) for way in ("exchange", "bulk")]
    wait_for_device(tp.group, device)
    return torch.equal(*ways)


def strided(case: Case) -> bool:
    """Whether a strided input of three dimensions gives the sum of the dense one."""
    tp, device = ready()
    x, how = case.part(tp.rank, device), (tp.group, case.codec, case.group_size, case.algorithm)
    given = x.repeat_interleave(2, dim=1)[:, ::2].unflatten(0, (1, -1))
    total, dense = tp_all_reduce(given, *how), tp_all_reduce(x, *how)
    wait_for_device(tp.group, device)
    return torch.equal(total[0], dense)


def norms(case: Case, split: bool) -> tuple[bool, float, float]:
    """Whether y has the same bits everywhere; relative errors of y and of the stream (split: own rows)."""
    tp, device = ready()
    generator = torch.Generator(device).manual_seed(7)
    residual = torch.randn(case.rows, case.width, generator=generator, device=device)
    weight = torch.randn(case.width, generator=generator, device=device).to(case.dtype)
    whole = sum(case.part(rank, device).double() for rank in range(tp.degree))
    expected, stream = add_rms_norm_reference(whole, residual.double(), weight.double(), 1e-5)
    args = (case.part(tp.rank, device), residual, weight, 1e-5, tp.group)
    how = (case.codec, case.group_size, case.algorithm)
    if split:
        y, own = tp_all_reduce_add_rms_norm_split(*args, tp.degree, *how)
        stream = stream[tp.rank * len(own) :][: len(own)]
        own = own[: len(stream)]
    else:
        y, own = tp_all_reduce_add_rms_norm(*args, *how)
    wait_for_device(tp.group, device)
    return same_bits(y), _relative(y, expected), _relative(own, stream)


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-9))


def codec_bits(cases: list[Case]) -> list[str]:
    """Where the Triton codecs differ from the definitions, on this GPU."""
    device = ready()[1]
    return [line for case in cases for line in _codec_differences(case, device)]


def _codec_differences(case: Case, device: torch.device) -> list[str]:
    torch.manual_seed(1)
    ranks, spread = dist.get_world_size(), torch.linspace(-6, 4, case.width, device=device)
    x = torch.randn(ranks, case.rows, case.width, device=device) * 10.0**spread
    x[1] = (127 * torch.rand(case.rows, case.width, device=device)).round() / 2  # ties
    x[1, 0, 0] = torch.nan
    x = x.to(case.dtype)
    layout = (case.width, case.dtype, case.codec, case.group_size)

    def results(name: str) -> dict[str, Tensor]:
        with backend.using(name, device):
            parts = torch.stack([encode_rows(part, *layout[2:], case.rows) for part in x])
            decoded = torch.stack([decode_rows(part, *layout) for part in parts])
            sums = (sum_rows(parts, *layout), sum_rows(parts, *layout, x[1], 1))
            return {"decoded": decoded, "sum": torch.stack([decode_rows(total, *layout) for total in sums])}

    ours, theirs = results("triton"), results("reference")
    return [
        f"{case}, {name}: {int((ours[name] != theirs[name]).sum())} of {ours[name].numel()}"
        for name in ours
        if not torch.equal(ours[name].nan_to_num(nan=1e30), theirs[name].nan_to_num(nan=1e30))
    ]


def fed_back(case: Case, calls: int) -> int:
    """Sums in a row with error feedback over NCCL, whose bits are not the codec ops'."""
    tp, device = ready()
    return wrong_sums(tp, case, calls, device)


def replays(case: Case, times: int) -> int:
    """Replays of a graph with a sum and a norm and new inputs; how often it differed from plain calls."""
    tp, device = ready()
    x = torch.empty(case.rows, case.width, dtype=case.dtype, device=device)
    residual, weight = torch.zeros_like(x, dtype=torch.float32), torch.ones_like(x[0])
    how = (tp.group, case.codec, case.group_size, case.algorithm)

    def step() -> tuple[Tensor, Tensor]:
        return tp_all_reduce(x, *how), tp_all_reduce_add_rms_norm(x, residual, weight, 1e-5, *how)[0]

    x.normal_()
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = step()
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    torch.manual_seed(tp.rank)
    for _ in range(times):
        x.normal_()
        graph.replay()
        kept = [t.clone() for t in captured]
        for got, again in zip(kept, step(), strict=True):  # the same call without a graph
            wrong += (got != again).any()
    wait_for_device(tp.group, device)
    return int(wrong)


def replayed_products(rows: int, columns: int, width: int, dtype: torch.dtype, times: int) -> int:
    """Replays of linear layers that push, ranks out of step; how often bits differ from a push after one.

    Layer after layer, each on what the one before has made, where that is as wide.
    """
    tp, device = ready()
    x = torch.randn(rows, width, dtype=dtype, device=device)
    weight = (torch.randn(columns, width, device=device) / width**0.5).to(dtype)
    torch.manual_seed(5)  # the residual stream is alike on all ranks
    residual, scale = torch.randn(rows, columns, device=device), torch.ones_like(weight[:, 0])
    torch.manual_seed(tp.rank)
    wire = Wire(algorithm="one_shot")
    assert all(pushes_product(x, weight, tp.group, wire, with_norm=norm) for norm in (False, True))

    def step(pushes: bool) -> list[Tensor]:
        made, given, stream = list[Tensor](), x, residual
        for _ in range(3):
            if pushes:
                made.append(tp_linear_all_reduce(given, weight, tp.group))
                normed = (given, weight, stream, scale, 1e-5, tp.group)
                made += tp_linear_all_reduce_add_rms_norm(*normed)
            else:
                with words_a_program(dtype):
                    part = linear(given, weight)
                made.append(tp_all_reduce(part, *how))
                made += tp_all_reduce_add_rms_norm(part, stream, scale, 1e-5, *how)
            if columns == width:
                given, stream = made[-2:]
        return made

    how = (tp.group, "none", 128, "one_shot")
    step(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = step(True)
    wrong, own = torch.zeros((), dtype=torch.int64, device=device), random.Random(tp.rank)
    for _ in range(times):
        x.normal_()
        if own.random() < 0.02:
            torch.cuda._sleep(int(own.random() * 300_000))
        graph.replay()
        for got, again in zip(captured, step(False), strict=True):
            wrong += (got != again).any()
    wait_for_device(tp.group, device)
    return int(wrong) + times * (not all(map(same_bits, captured)))


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


def parts_of_the_ranks(calls: int) -> int:
    """Sums over all ranks and over pairs of them in turn, in memories of their own; how many were wrong."""
    tp, device = ready()
    names = [register_group("all again", tp.mesh.get_group(), 20.0), tp.subgroup(2)]
    from ssm_dist.parallel.collectives.shared import open_shared_memory

    assert all(open_shared_memory(name, 2 * WIDTH, 2 * WIDTH * TOKENS, device) for name in names)
    members = [range(tp.degree), range(tp.rank - tp.rank % 2, tp.rank - tp.rank % 2 + 2)]
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for call in range(calls):
        for name, ranks in zip(names, members, strict=True):
            x = torch.full((3, 2560), call % 7 + tp.rank, dtype=torch.bfloat16, device=device)
            total = tp_all_reduce(x, name, "none", 128, (*SHORT, "bulk")[call % 3])
            wrong += (total != len(ranks) * (call % 7) + sum(ranks)).any()
    wait_for_device(tp.group, device)
    return int(wrong)


def alone(absent: int, algorithms: list[str]) -> list[str]:
    """What the others are told when one rank stays away; in groups whose memory is then lost."""
    tp, device = ready()
    from ssm_dist.parallel.collectives.shared import open_shared_memory

    names = [register_group(f"impatient {algorithm}", tp.mesh.get_group(), 2.5) for algorithm in algorithms]
    x = torch.ones(16, 2560, dtype=torch.bfloat16, device=device)
    for name, algorithm in zip(names, algorithms, strict=True):
        open_shared_memory(name, 2 * WIDTH, 2 * WIDTH * 64, device)
        tp_all_reduce(x, name, "none", 128, algorithm)
        wait_for_device(name, device)
    if tp.rank == absent:
        time.sleep(4.0 * len(names))
        return []
    failures.SLICE, failures.GRACE = 0.2, 0.5  # for two ranks it is soon clear who waits
    messages = []
    for name, algorithm in zip(names, algorithms, strict=True):
        tp_all_reduce(x, name, "none", 128, algorithm)
        try:
            wait_for_device(name, device)
        except RankFailure as error:
            messages.append(str(error))
    return messages


def fallback() -> tuple[str, list[float]]:
    """A sum whose shape no push can serve, one of a dtype that no kernel takes, one that must not share."""
    tp, device = ready()
    odd = tp_all_reduce(torch.full((3, 37), tp.rank + 1.0, device=device), tp.group, "none", 128, "one_shot")
    wide = tp_all_reduce(torch.ones(2, 5, dtype=torch.float64, device=device), tp.group)
    apart = tp_all_reduce(torch.ones(4, 16, device=device), tp.group, "none", 128, "process_group")
    wait_for_device(tp.group, device)
    return carrier(tp.group), [float(value) for t in (odd, wide, apart) for value in t.unique()]
