"""Compiles the kernels over shared memory for a GPU that need not be there: registers, stack, as JSON.

python -m tests.kernels.reductions_ahead_of_time
"""

import json
from typing import Any

import torch
from triton.compiler import CompiledKernel

from ssm_dist.kernels import tuning
from ssm_dist.kernels.gluon_linear import few_rows_kernel
from ssm_dist.kernels.triton_bulk import ALONE, BESIDE, CODE, PROGRAMS, WARPS, WORDY, Form, aheads
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


def push_vector(dtype: torch.dtype, rows: int, width: int, ranks: int) -> tuple[CompiledKernel, int]:
    """The kernel of `triton_push_product` for few rows, for sm_90, and the words that it pushes."""
    numbers = 4 // dtype.itemsize
    blocks = {"BLOCK_N": numbers, "BLOCK_K": 512 // dtype.itemsize * 4 // numbers}
    given = {"K": width, "TOKENS": rows, "num_warps": 4, **blocks}
    return compiled(push_vector_kernel, given | pushed(dtype, ranks), 90), rows * ranks


def push_matrix(
    dtype: torch.dtype, rows: int, blocks: dict[str, int], ranks: int, shared: bool, whole: bool
) -> tuple[CompiledKernel, int]:
    """The one for more rows, and the words that a thread pushes. blocks: of the tuning table."""
    given = {"parts": "*fp32", "counters": "*i32", "SHARED": shared, "WHOLE": whole, "BLOCK_T": rows}
    words = rows * blocks["BLOCK_N"] // 2 // (32 * blocks["num_warps"]) * ranks
    given |= {**blocks, **pushed(dtype, ranks)}
    return compiled(push_matrix_kernel, given, 90), words


def pushed(dtype: torch.dtype, ranks: int) -> dict[str, Any]:
    """What kernels that push products are given."""
    kind = TYPES[dtype]
    return {
        "x": kind, "weight": kind, "peers": ("i64",) * ranks, "uses": "*i32", "RANKS": ranks, "PDL": True
    }  # fmt: skip


def push_held(dtype: torch.dtype, warps: int, ranks: int) -> tuple[CompiledKernel, int]:
    """The one of `gluon_linear`, and the words that a thread pushes, of the first 64 threads."""
    given = {"y": TYPES[dtype], "bias": TYPES[dtype], "parts": "*fp32", "counters": "*i32"}
    given |= {"K": 1280, "SHARES": 2, "EIGHTS": 2, "HAS_BIAS": False, "WARPS": warps, "num_warps": warps}
    return compiled(few_rows_kernel, given | pushed(dtype, ranks), 90), 2 * ranks


def push_products() -> dict[str, tuple[CompiledKernel, int]]:
    """All that the tuning table asks for, by name."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    found = {
        f"vector {dtype} {rows} x {width}, {ranks} ranks": push_vector(dtype, rows, width, ranks)
        for dtype, rows, width, ranks in (
            (bf16, 1, 4096, 2), (bf16, 1, 2560, 4), (f16, 4, 2560, 4), (f32, 1, 1856, 2), (f32, 4, 512, 3)
        )
    }  # fmt: skip
    tiles = {
        (config.get("BLOCK_T", most), *sorted(config.items()))
        for most in (16, 32)
        for op in (f"linear_{most}", f"linear_{most}_deep")
        for _, config in tuning.TABLE.get(op, {}).get(90, [])
        if config
    }
    for rows, *items in sorted(tiles):
        blocks = {name: n for name, n in items if name not in ("BLOCK_T", "PROGRAMS")}
        for dtype, ranks, *how in (bf16, 2, True, True), (f16, 4, False, True), (bf16, 2, False, False):
            name = f"matrix {dtype} {rows} {blocks}, {ranks} {how}"
            found[name] = push_matrix(dtype, rows, blocks, ranks, *how)
    for dtype, warps, ranks in (bf16, 4, 2), (f16, 8, 4):
        found[f"held {dtype} {warps}, {ranks}"] = push_held(dtype, warps, ranks)
    return found


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
    for name, (kernel, words) in push_products().items():
        stores = kernel.asm["ptx"].count("st.relaxed.sys.global.b32")
        row = {"kernel": f"push product {name}", "stores": stores, "words": words, **resources(kernel)}
        print(json.dumps(row), flush=True)
    for codec, group, ranks, norm in (
        ("none", 128, 2, True),
        ("none", 128, 4, False),
        ("int8", 128, 2, False),
        ("int8", 128, 4, True),
        ("fp8", 128, 2, True),
        ("int4", 32, 4, False),
    ):
        for name, form in {"alone": WORDY if codec == "fp8" else ALONE, "beside": BESIDE}.items():
            found = resources(bulk(codec, group, ranks, norm, form))
            found["most"] = form.registers
            print(json.dumps({"kernel": f"bulk {codec} {ranks} {norm} {name}", **found}), flush=True)


if __name__ == "__main__":
    main()
