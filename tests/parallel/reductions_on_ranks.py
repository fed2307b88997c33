"""What the tests of reductions run on ranks; without slow imports."""

from __future__ import annotations

import logging.handlers
import os
import queue
import time
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_process_group_store

from ssm_dist.kernels import add_rms_norm
from ssm_dist.parallel import TensorParallel
from ssm_dist.parallel.collectives import (
    RankFailure,
    Wire,
    register_group,
    tp_all_reduce,
    tp_all_reduce_add_rms_norm,
    tp_all_reduce_add_rms_norm_split,
    tp_all_reduce_spent,
    tp_gather_rows,
)

DEVICE = "cpu"


@dataclass(frozen=True)
class Case:
    """One reduction: what is summed, and how."""

    kind: str
    """A key of `INPUTS`."""
    rows: int
    width: int
    dtype: torch.dtype
    codec: str
    group_size: int
    algorithm: str = "auto"

    def __str__(self) -> str:
        return f"{self.kind}-{self.rows}x{self.width}-{str(self.dtype)[6:]}-{self.codec}-{self.group_size}"

    def part(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """What a rank contributes; every rank can compute everybody's."""
        generator = torch.Generator(device).manual_seed(100 + rank)
        x = torch.randn(self.rows, self.width, generator=generator, device=device)
        return INPUTS[self.kind](x, rank).to(self.dtype)


def _with(x: Tensor, value: float, at: tuple[int, int]) -> Tensor:
    x[at] = value
    return x


LARGEST = torch.finfo(torch.bfloat16).max
INPUTS = {
    "normal": lambda x, rank: x,
    "zeros": lambda x, rank: torch.zeros_like(x),
    "constant": lambda x, rank: torch.full_like(x, 0.1 * (rank + 1)),
    "outlier": lambda x, rank: _with(x, 3e4, (0, min(5, x.shape[1] - 1))),
    "scaled": lambda x, rank: x * 10.0 ** (3 * rank - 4),
    "cancelling": lambda x, rank: x * 0 + (1.0 if rank % 2 else -1.0),
    "largest": lambda x, rank: x.sign() * (LARGEST if rank == 0 else 1.0),
    "nan": lambda x, rank: _with(x, torch.nan, (-1, 0)) if rank == 1 else x,
    "infinite": lambda x, rank: _with(x, torch.inf, (-1, 0)) if rank == 0 else x,
}


def all_ranks() -> TensorParallel:
    return TensorParallel.over_all_ranks(DEVICE)


def sums(cases: list[Case], span: int | None = None) -> list[Tensor]:
    """The outputs of the cases, over all ranks or over groups of `span`."""
    tp = all_ranks()
    group = tp.group if span is None else tp.subgroup(span)
    return [
        tp_all_reduce(case.part(tp.rank), group, case.codec, case.group_size, case.algorithm)
        for case in cases
    ]


def strided_sum(case: Case) -> tuple[bool, bool]:
    """Whether a strided input of three dimensions gives the sum of the dense one, and stays as it was."""
    tp = all_ranks()
    x = case.part(tp.rank)
    wide = x.repeat_interleave(2, dim=1)
    given = wide[:, ::2].unflatten(0, (1, -1))
    total = tp_all_reduce(given, tp.group, case.codec, case.group_size)
    dense = tp_all_reduce(x, tp.group, case.codec, case.group_size)
    return torch.equal(total[0], dense), torch.equal(wide[:, ::2], x)


def spent_sums() -> list[tuple[bool, bool]]:
    """Of tensors whose memory may be taken: whether it was, and whether the sum is right."""
    tp, found = all_ranks(), []
    for codec, x in (
        ("none", torch.ones(4, 6)),
        ("int8", torch.ones(4, 6)),
        ("none", torch.ones(4, 6)[:, ::2]),
    ):
        total = tp_all_reduce_spent(x, tp.group, codec, 32)
        found.append((total.data_ptr() == x.data_ptr(), bool((total == tp.degree).all())))
    return found


def fused_and_apart(case: Case, with_residual: bool) -> tuple[Tensor, Tensor, bool]:
    """The fused op's results, and whether they are those of the sum and the norm one after the other."""
    tp = all_ranks()
    generator = torch.Generator().manual_seed(7)
    residual = torch.randn(case.rows, case.width, generator=generator) if with_residual else None
    weight = torch.randn(case.width, generator=generator).to(case.dtype)
    partial = case.part(tp.rank)
    args = (tp.group, case.codec, case.group_size, case.algorithm)
    y, total = tp_all_reduce_add_rms_norm(partial, residual, weight, 1e-5, *args)
    expected = add_rms_norm(tp_all_reduce(partial, *args), residual, weight, 1e-5)
    return y, total, torch.equal(y, expected[0]) and torch.equal(total, expected[1])


def split_residual(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two norms in a row, the residual whole before them and split between them; and the same unsplit."""
    tp = all_ranks()
    generator = torch.Generator().manual_seed(7)
    residual = torch.randn(case.rows, case.width, generator=generator)
    weight = torch.randn(case.width, generator=generator).to(case.dtype)
    args = (weight, 1e-5, tp.group)
    how = (case.codec, case.group_size, case.algorithm)
    first, stripe = tp_all_reduce_add_rms_norm_split(case.part(tp.rank), residual, *args, tp.degree, *how)
    second, stripe = tp_all_reduce_add_rms_norm_split(first * tp.rank, stripe, *args, tp.degree, *how)
    whole, stream = tp_all_reduce_add_rms_norm(case.part(tp.rank), residual, *args, *how)
    again, stream = tp_all_reduce_add_rms_norm(whole * tp.rank, stream, *args, *how)
    own = stream[tp.rank * len(stripe) : (tp.rank + 1) * len(stripe)]
    return second, again, stripe[: len(own)], own


@torch.inference_mode()
def stream_made_whole(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A norm, one of more columns and a norm, the residual stream split where it can be; and never split."""
    from ssm_dist.models.layers import AddRMSNorm
    from ssm_dist.parallel import styles

    tp, generator = all_ranks(), torch.Generator().manual_seed(7)
    residual = torch.randn(rows, 24, generator=generator)
    branches = [Case("normal", rows, 24, torch.float32, "none", 32).part(tp.rank) * n for n in (1, 2, 3)]
    found: list[Tensor] = []
    for split in (True, False):
        norm, wider = AddRMSNorm(24, 1e-5), AddRMSNorm(29, 1e-5)
        for module in (norm, wider):
            torch.nn.init.ones_(module.weight)
            styles.ReduceAddNorm(may_split=module is norm).install(module, tp)
        with unittest.mock.patch.object(styles, "splits_residual", lambda *_, split=split: split):
            _, stream = norm(branches[0].clone(), residual)
            assert (len(stream) < rows) == split
            wide, whole = wider(branches[1].clone(), stream, residual[:, :5])
            found += [torch.cat([wide, whole], 1), norm(branches[2].clone(), whole)[0]]
    return found[0], found[1], found[2], found[3]


def check_ops() -> None:
    """torch's own check of the schemas, the fake implementations and functionalisation."""
    tp = all_ranks()
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for codec in ("none", "int8", "fp8", "int4"):
        x = Case("normal", 3, 40, torch.bfloat16, codec, 32).part(tp.rank)
        torch.library.opcheck(tp_all_reduce, (x, tp.group, codec, 32), test_utils=checks)
        args = (torch.randn(3, 40), torch.ones(40, dtype=torch.bfloat16), 1e-5, tp.group, codec, 32)
        torch.library.opcheck(tp_all_reduce_add_rms_norm, (x, *args), test_utils=checks)
        without = (x, None, *args[1:])
        torch.library.opcheck(tp_all_reduce_add_rms_norm, without, test_utils=checks)
        split = (x, *args[:4], tp.degree, codec, 32)
        torch.library.opcheck(tp_all_reduce_add_rms_norm_split, split, test_utils=checks)
    torch.library.opcheck(tp_gather_rows, (torch.randn(2, 5), 3, tp.group, tp.degree), test_utils=checks)


def compiled_and_eager(codec: str) -> tuple[Tensor, Tensor]:
    """A step with both ops inside, compiled as one graph, and as it is."""
    tp = all_ranks()
    weight = torch.ones(40)

    def step(x: Tensor, residual: Tensor) -> Tensor:
        small = tp_all_reduce(torch.sin(x), tp.group, codec, 32) + 1
        y, total = tp_all_reduce_add_rms_norm(small * x, residual, weight, 1e-5, tp.group, codec, 32)
        return y * 2 + total

    x, residual = Case("normal", 5, 40, torch.float32, codec, 32).part(tp.rank), torch.zeros(5, 40)
    return torch.compile(step, backend="aot_eager", fullgraph=True)(x, residual), step(x, residual)


def traced_with_shared_memory() -> tuple[list[str], int]:
    """Reductions in the graphs of a norm of few tokens and many, were memory shared; number of graphs."""
    from ssm_dist.models.layers import AddRMSNorm
    from ssm_dist.parallel.collectives.groups import group_named
    from ssm_dist.parallel.collectives.shared import memory_at
    from ssm_dist.parallel.styles import ReduceAddNorm

    tp, norm = all_ranks(), AddRMSNorm(1024, 1e-5)
    group = group_named(tp.group)
    group.memory = memory_at([0] * tp.degree, group, 4096, 2**26, torch.device("cpu"))
    ReduceAddNorm(may_split=True).install(norm, tp)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return lambda *inputs: [torch.empty(0)] * 2

    step = torch.compile(norm.forward, backend=backend, fullgraph=True, dynamic=True)
    try:
        with torch.no_grad():
            for tokens in (3, 9, 4000, 5000):
                step(torch.ones(tokens, 1024), torch.ones(tokens, 1024))
    finally:
        group.memory = None
    calls = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    return [call.split(".")[1] for call in calls if "tp_all_reduce" in call], len(graphs)


def shared_where_it_cannot_be() -> tuple[bool, list[str], str, Tensor]:
    """Whether CPU ranks could open shared memory, what was logged, what carries a sum then, and a sum."""
    from ssm_dist.parallel.collectives import carrier, shared

    tp, lines = all_ranks(), logging.handlers.QueueHandler(queue.SimpleQueue())
    shared.logger.addHandler(lines)
    shared.logger.setLevel(logging.INFO)
    opened = [shared.open_shared_memory(tp.group, 128, 1024, torch.device("cpu")) for _ in range(2)]
    logged = [lines.queue.get().getMessage() for _ in range(lines.queue.qsize())]
    shared.logger.removeHandler(lines)
    return any(opened), logged, carrier(tp.group), tp_all_reduce(torch.ones(3), tp.group)


def slow_reduction() -> tuple[str, str]:
    """What two ranks say of their waits in the store when one came late to a reduction that then ended."""
    tp = all_ranks()
    name = register_group("patient", tp.mesh.get_group(), 20.0)
    time.sleep(0.0 if tp.rank == 0 else 1.5)
    tp_all_reduce(torch.ones(2, 64), name, "int8")
    dist.barrier()
    store = _get_process_group_store(tp.mesh.get_group())
    keys = [f"patient waiting {rank}" for rank in range(2)]
    found = [store.get(key).decode() if store.check([key]) else "never" for key in keys]
    return found[0], found[1]


def without_a_rank(absent: int, timeout: float) -> None:
    """A reduction that one rank does not take part in; the others raise."""
    name = register_group("all", dist.group.WORLD)
    tp_all_reduce(torch.ones(2, 64), name, "int8")  # makes the connections
    if dist.get_rank() == absent:
        time.sleep(timeout + 20)
    else:
        tp_all_reduce(torch.ones(2, 64), register_group("impatient", dist.group.WORLD, timeout), "int8")


def until_one_dies(rank: int, size: int, absent: int, folder: Path) -> None:
    """A rank's life in processes of its own; the survivors write what the reduction says into the folder."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rendezvous = (folder / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
    name = register_group("all", dist.group.WORLD, 60.0)
    tp_all_reduce(torch.ones(2, 64), name, "int8")
    if rank == absent:
        os._exit(9)
    try:
        tp_all_reduce(torch.ones(2, 64), name, "int8")
    except RankFailure as error:
        (folder / f"{rank}.txt").write_text(str(error))
    os._exit(0)


def logits_of(folder: Path, codec: str, group_size: int, algorithm: str = "auto") -> Tensor:
    """Log-probabilities that a checkpoint gives a fixed text, with one kind of reduction."""
    from ssm_dist.llm import LLM

    reduction = {"codec": codec, "group_size": group_size, "algorithm": algorithm}
    llm = LLM.from_pretrained(folder, reduction=reduction, prefill={"chunk_tokens": 16})
    assert llm.loaded.tp is not None
    assert llm.loaded.tp.reductions.branch == Wire(codec, group_size, algorithm)
    text = [(7 * i * i + 3 * i) % 90 for i in range(50)]
    return torch.tensor(llm.score([text])[0].log_probs)


def logits_by_products(folder: Path) -> tuple[Tensor, int, int]:
    """`logits_of`, as if linear layers pushed their outputs; how many sums they made, and ones with norms."""
    from ssm_dist.kernels import linear
    from ssm_dist.parallel import styles

    plain = unittest.mock.Mock(side_effect=lambda x, weight, group: tp_all_reduce(linear(x, weight), group))
    normed = unittest.mock.Mock(
        side_effect=lambda x, weight, residual, scale, eps, group: tp_all_reduce_add_rms_norm(
            linear(x, weight), residual, scale, eps, group
        )
    )
    with (
        unittest.mock.patch.object(styles, "pushes_product", lambda *_, **__: True),
        unittest.mock.patch.object(styles, "tp_linear_all_reduce", plain),
        unittest.mock.patch.object(styles, "tp_linear_all_reduce_add_rms_norm", normed),
    ):
        return logits_of(folder, "none", 128), plain.call_count, normed.call_count
