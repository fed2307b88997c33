"""What the tests of error feedback run on ranks; without slow imports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ssm_dist.kernels.codecs import decode_rows, encode_rows_with_feedback, sum_rows_with_feedback
from ssm_dist.parallel import TensorParallel, feedback
from ssm_dist.parallel.collectives import Reductions, Wire, tp_all_reduce_with_feedback
from tests.parallel.reductions_on_ranks import Case

TEXT = [[(a * i * i + 3 * i) % 90 for i in range(60)] for a in (5, 7, 11, 13, 17, 19)]


def stream_of_many_sums(case: Case, layers: int, fed_back: bool) -> tuple[Tensor, ...]:
    """A residual stream after many seams, some with more columns, some beside the stream; the exact one.

    With feedback, this rank's errors of the last sum, too.
    """
    from ssm_dist.models.layers import AddRMSNorm
    from ssm_dist.parallel.styles import ReduceAddNorm

    wire = Wire(case.codec, case.group_size, "exchange")
    tp = TensorParallel.over_all_ranks("cpu", Reductions(branch=wire, feedback=fed_back))
    norm, wider = (AddRMSNorm(width, 1e-5).to(case.dtype) for width in (case.width, 2 * case.width))
    for module in (norm, wider):
        torch.nn.init.ones_(module.weight)
        ReduceAddNorm(may_split=module is norm).install(module, tp)
    generator = torch.Generator().manual_seed(5)
    parts = torch.randn(layers, tp.degree, case.rows, case.width, generator=generator).to(case.dtype)
    stream = torch.randn(case.rows, case.width, generator=generator)
    exact = stream.double()
    with torch.no_grad():
        for layer, branches in enumerate(parts):
            exact = exact + branches.double().sum(0)
            if layer % 3 == 1:
                stream = wider(branches[tp.rank], stream, stream)[1]
                norm(branches[tp.rank] * 7, stream)  # of the stream and something else
            else:
                stream = norm(branches[tp.rank], stream)[1]
    return stream, exact, *feedback._errors.get(stream, ())


def wrong_sums(tp: TensorParallel, case: Case, calls: int, device: str | torch.device = "cpu") -> int:
    """Of sums in a row with feedback, those whose bits are not the codec ops', played for all ranks here."""
    codec, group_size = case.codec, case.group_size
    stripe = -(-case.rows // tp.degree)
    of_parts: list[Tensor | None] = [None] * tp.degree
    of_sums: list[Tensor | None] = [None] * tp.degree
    errors, wrong = None, 0
    for call in range(calls):
        parts = [case.part(rank, device) * (call + 1) for rank in range(tp.degree)]
        total, errors = tp_all_reduce_with_feedback(parts[tp.rank], errors, tp.group, codec, group_size)
        sent = []
        for rank, part in enumerate(parts):
            rows, of_parts[rank] = encode_rows_with_feedback(
                part, of_parts[rank], codec, group_size, tp.degree * stripe
            )
            of_parts[rank][rank * stripe : (rank + 1) * stripe] = 0  # type: ignore[index]
            sent.append(rows.unflatten(0, (tp.degree, stripe)))
        sums = []
        for owner in range(tp.degree):
            stripes = torch.stack([rows[owner] for rows in sent])
            own = parts[owner][owner * stripe : (owner + 1) * stripe]
            own = torch.nn.functional.pad(own, (0, 0, 0, stripe - len(own)))
            encoded, of_sums[owner] = sum_rows_with_feedback(
                stripes, of_sums[owner], case.width, case.dtype, codec, group_size, own, owner
            )
            sums.append(decode_rows(encoded, case.width, case.dtype, codec, group_size))
        wrong += not torch.equal(total, torch.cat(sums)[: case.rows])
    return wrong


def wrong_sums_on_cpus(case: Case, calls: int) -> int:
    """`wrong_sums` over gloo."""
    return wrong_sums(TensorParallel.over_all_ranks("cpu"), case, calls)


def seams_that_feed_back(width: int, lengths: list[int]) -> list[tuple[bool, bool]]:
    """Of norms, then of those of more columns, were memory shared: whether it is encoded, and fed back.

    Encoded: without feedback, by whatever algorithm. Nothing is summed.
    """
    from ssm_dist.models.layers import AddRMSNorm
    from ssm_dist.parallel import styles
    from ssm_dist.parallel.collectives.groups import group_named
    from ssm_dist.parallel.collectives.selection import choose
    from ssm_dist.parallel.collectives.shared import memory_at

    wire = Wire("int4", 32)
    tp = TensorParallel.over_all_ranks("cpu", Reductions(branch=wire, feedback=True))
    norm, wider = AddRMSNorm(width, 1e-5).bfloat16(), AddRMSNorm(width + 1, 1e-5).bfloat16()
    for module in (norm, wider):
        styles.ReduceAddNorm(may_split=module is norm).install(module, tp)
    fed_back: list[bool] = []

    def fed(branch: Tensor, *_: Any) -> tuple[Tensor, Callable[[Tensor], None]]:
        fed_back.append(True)
        return branch, lambda stream: None

    def plain(branch: Tensor, residual: Any = None, *_: Any) -> tuple[Tensor, Any]:
        fed_back.append(False)
        return branch, residual

    group, encoded = group_named(tp.group), []
    group.memory = memory_at([0] * tp.degree, group, 2 * width, 2**26, torch.device("cpu"))
    replaced = {
        "sum_with_feedback": fed, "tp_all_reduce_add_rms_norm": plain,
        "tp_all_reduce_add_rms_norm_split": plain, "tp_all_reduce_spent": lambda x, *_: plain(x)[0],
    }  # fmt: skip
    try:
        with torch.no_grad(), mock.patch.multiple(styles, **replaced):
            for with_norm, seam in ((True, norm), (False, wider)):
                for length in lengths:
                    branch = torch.ones(length, width, dtype=torch.bfloat16)
                    seam(branch, branch.float(), *([] if with_norm else [branch[:, :1]]))
                    chosen = choose(group, branch, wire.codec, wire.group_size, "auto", with_norm)
                    encoded.append(chosen in ("bulk", "exchange"))
    finally:
        group.memory = None
    return list(zip(encoded, fed_back, strict=True))


def bytes_of_errors(rows: int, width: int, dtype: torch.dtype) -> int:
    """What a sum with feedback leaves on this rank."""
    tp = TensorParallel.over_all_ranks("cpu")
    x = torch.ones(rows, width, dtype=dtype)
    return sum(error.nbytes for error in tp_all_reduce_with_feedback(x, None, tp.group, "int4", 32)[1])


def scores(folder: Path, reduction: dict[str, object]) -> tuple[Tensor, str, int]:
    """Log-probabilities of some texts, how the model says it adds up, and errors that are held at the end."""
    from ssm_dist.llm import LLM

    llm = LLM.from_pretrained(folder, reduction=reduction, cache={"max_sequences": len(TEXT)})
    found = [score.log_probs for score in llm.score(TEXT)]
    return torch.tensor(found), llm.reduction, len(feedback._errors)
