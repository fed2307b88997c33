"""Compiles the kernels over shared memory for a GPU that need not be there: registers, stack, as JSON.

python -m tests.kernels.reductions_ahead_of_time
"""

import json
from typing import Any

import torch
from triton.compiler import CompiledKernel

from ssm_dist.kernels.triton_bulk import ALONE, BESIDE, CODE, PROGRAMS, WARPS, Form, aheads
from ssm_dist.kernels.triton_bulk_kernel import bulk_kernel
from ssm_dist.kernels.triton_codec_tiles import CHUNK, CODES, ROWS
from ssm_dist.kernels.triton_push import ALL, _push_sum_kernel
from ssm_dist.kernels.triton_push import CODES as PUSH_CODES
from ssm_dist.kernels.triton_push_product import push_matrix_kernel, push_vector_kernel
from ssm_dist.kernels.triton_remote import taking
from tests.kernels.ahead_of_time import compiled, resources

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def common(dtype: torch.dtype, ranks: int, with_norm: bool) -> dict[str, Any]:
    """What both kernels are given."""
    kind = TYPES[dtype]
    return {
        "x": kind, "weight": kind, "y": kind, "residual": "*fp32", "total": "*fp32", "eps": "fp32",
        "peers": ("i64",) * ranks, "error": "*i32", "limit": "i64", "RANKS": ranks, "PHASE": ALL,
        "WITH_NORM": with_norm, "HAS_RESIDUAL": with_norm,
    }  # fmt: skip


def push(
    dtype: torch.dtype, ranks: int, two_shot: bool, with_norm: bool, block: int, early: bool = True
) -> CompiledKernel:
    """The kernel of `triton_push` for sm_90."""
    given = common(dtype, ranks, with_norm) | {
        "counters": "*i32", "TWO_SHOT": two_shot, "CODE": PUSH_CODES["two_shot" if two_shot else "one_shot"],
        "TAKE_PARTS": taking(ranks, dtype), "TAKE_SUM": taking(1, dtype), "BLOCK": block,
        "EARLY": early, "PDL": True, "num_warps": min(16, block // 32),
    }  # fmt: skip
    return compiled(_push_sum_kernel, given, 90)


def push_product(rows: int, width: int, ranks: int) -> CompiledKernel:
    """The kernels of `triton_push_product` for sm_90, for bfloat16, of sums so long."""
    given = {
        "x": "*bf16", "weight": "*bf16", "peers": ("i64",) * ranks, "uses": "*i32", "RANKS": ranks,
        "PDL": True, "num_warps": 4,
    }  # fmt: skip
    if rows <= 4:
        vector = {"K": width, "TOKENS": rows, "BLOCK_N": 2, "BLOCK_K": 512, "THREADS": 128}
        return compiled(push_vector_kernel, given | vector, 90)
    matrix = {"parts": "*fp32", "counters": "*i32", "SHARED": True, "WHOLE": True, "WARPS": 4}
    blocks = {"BLOCK_T": rows, "BLOCK_N": 64, "BLOCK_K": 128, "AHEAD": 0, "num_stages": 4}
    return compiled(push_matrix_kernel, given | matrix | blocks, 90)


def bulk(codec: str, group: int, ranks: int, with_norm: bool, form: Form) -> CompiledKernel:
    """The kernel of `triton_bulk` for sm_90, for bfloat16."""
    given = common(torch.bfloat16, ranks, with_norm) | {
        "epochs": "*i32", "CODEC": CODES[codec], "GROUP": group, "CODE": CODE, "FLAGS": 4 * PROGRAMS,
        "ROWS": ROWS, "CHUNK": CHUNK, **aheads(form, 2560, ranks),
        "num_warps": WARPS, "maxnreg": form.registers, "enable_fp_fusion": False,
    }  # fmt: skip
    return compiled(bulk_kernel, given, 90)


def main() -> None:
    """A line a kernel."""
    for dtype, ranks, two_shot in (
        (torch.bfloat16, 2, False), (torch.bfloat16, 4, True), (torch.float16, 2, True),
        (torch.float32, 4, False),
    ):  # fmt: skip
        found = resources(push(dtype, ranks, two_shot, True, 512))
        print(json.dumps({"kernel": f"push {dtype} {ranks} {two_shot}", **found}), flush=True)
    late = resources(push(torch.bfloat16, 2, False, True, 512, early=False))
    print(json.dumps({"kernel": "push, the next kernel late", **late}), flush=True)
    for rows, width, ranks in (1, 4096, 2), (4, 2560, 4), (16, 2560, 2):
        found = resources(push_product(rows, width, ranks))
        print(json.dumps({"kernel": f"push product {rows} {width} {ranks}", **found}), flush=True)
    for codec, group, ranks, norm in (
        ("none", 128, 2, True),
        ("none", 128, 4, False),
        ("int8", 128, 2, False),
        ("int8", 128, 4, True),
        ("fp8", 128, 2, True),
        ("int4", 32, 4, False),
    ):
        for name, form in {"alone": ALONE, "beside": BESIDE}.items():
            found = resources(bulk(codec, group, ranks, norm, form))
            found["most"] = form.registers
            print(json.dumps({"kernel": f"bulk {codec} {ranks} {norm} {name}", **found}), flush=True)


if __name__ == "__main__":
    main()
