"""Compiles the Triton and Gluon kernels for GPUs that need not be there.

Run as a program, without TRITON_INTERPRET, since a process either interprets or compiles:

    python -m tests.kernels.ahead_of_time         registers and stack of all KERNELS, a line of JSON each
    python -m tests.kernels.ahead_of_time ptx     for each line of JSON on the input, {"kernel": of KERNELS,
                                                  "given": ..., "unaligned": [...]}, its PTX as JSON
    python -m tests.kernels.ahead_of_time loop gluon ...
                                                  machine instructions of these kernels' longest loops
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from ssm_dist.kernels import (
    decode_sizes,
    gluon_attention,
    gluon_layers,
    gluon_layers_few,
    gluon_linear,
    gluon_scan,
    triton_activation,
    triton_argmax,
    triton_attention,
    triton_conv,
    triton_last_tokens,
    triton_linear_kernels,
    triton_norm,
    triton_projected_update,
    triton_projected_update_many,
    triton_scan,
    triton_update,
    tuning,
)

LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")

POINTERS = {
    "*bf16": ["weight", "bias", "x", "y", "dt", "B", "C", "z", "branch", "appended", "query", "key",
              "value", "key_pages", "value_pages", "given"],
    "*fp32": ["A_log", "D", "skip", "dt_bias", "residual", "total", "ends", "sums", "tops", "totals",
              "parts"],
    "*i32": ["seq_offsets", "slots", "pages", "counters"],
    "*i64": ["positions"],
}  # fmt: skip
"""Types and the kernels' parameters that have them; what is not named is an integer."""
TYPES = {name: kind for kind, names in POINTERS.items() for name in names}

CONV = {"WIDTH": 4, "HAS_BIAS": True, "BLOCK_S": 256, "state": "*bf16"}
UPDATE = {"N": 16, "ONE_GROUP": True, "state": "*fp32"}
NORM = {"HAS_BRANCH": True, "HAS_RESIDUAL": True, "HAS_MORE": False, "BLOCK": 4096, "eps": "fp32"}
ROWS = {"ROWS": 4, "BLOCK": 256, "eps": "fp32"}
LARGEST = {"logits": "*bf16", "values": "*bf16", "ids": "*i64", "parts": "*i64", "UNIT": 8, "PARTS": 64}
LAST = {**dict.fromkeys(("last_token", "last_place", "slots", "tokens", "places"), "*i64"), "BLOCK": 128}
HEAD = {"PAGE": 16, "BLOCK": 512, "BLOCK_S": 32, "scale": "fp32", "num_warps": 2}
PARTS = {"BLOCK_N": 8, "STAGES": 4, "ALONE": False, "num_warps": 2}
JOIN = {"PARTS": 64, "BLOCK": 128, "BLOCK_P": 32, "BLOCK_N": 8}
SCAN = {
    "N": 16, "BLOCK": triton_scan.BLOCK, "CHUNK": 0, "BLOCK_S": 1, "SUMMARY": False, "state": "*fp32",
    "num_warps": 1,
}  # fmt: skip
GLUON = {
    "N": 16, "WARPS": 4, "DEPTH": 1, "EXTRA": 1, "STAGES": 0, "CHUNKED": False, "SECOND": False,
    "PDL": False, "state": "*fp32", "num_warps": 4,
}  # fmt: skip
CHUNKED = {**GLUON, "CHUNKED": True, "PDL": True, "DEPTH": 2}
STREAM = {**GLUON, "WARPS": 1, "STAGES": 4, "num_warps": 1, "maxnreg": 96}
STREAM_CHUNKED = {**STREAM, "CHUNKED": True, "PDL": True, "maxnreg": None}


VECTOR = {"K": 5120, "HEADS": 1, "HAS_BIAS": True, "BLOCK_K": 256}
PROJECTED = {"RANK": 160, "N": 16, "RMS": True, "BLOCK_R": 256, "eps": "fp32", "state": "*fp32"}
UPDATES = {**PROJECTED, "SEQUENCES": 16, "BLOCK_D": 16, "num_warps": 4}
MATRIX = {
    "SHARED": True, "WHOLE": True, "HAS_BIAS": True,
    "BLOCK_N": 64, "BLOCK_K": 64, "AHEAD": 512, "num_warps": 4, "num_stages": 4,
}  # fmt: skip


def layers(
    d_model: int, channels: int, dt_rank: int, ranks: int = 1, rms: bool = False, heads: int = 1,
    given: bool = False, normed: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Of `gluon_layers`, on a GPU of 132 multiprocessors, with or without the stream given, or returned."""
    programs, sharers = decode_sizes.programs_of(d_model, 132), max(1, ranks // heads)
    return {
        **decode_sizes.kernel_sizes(d_model, channels, dt_rank, 16, programs, ranks), "RMS": rms,
        "HEADS": max(1, heads // ranks), "SHARERS": sharers, "sharers": ("i64",) * sharers,
        "residual": "*fp32" if given else None, "NORMED": normed, **({} if normed else {"y": "*fp32"}),
        "anchor": "*i32", "table": "*i64", "hidden": "*bf16", "conv": "*bf16", "ssm": "*fp32",
        **dict.fromkeys(("words", "shared", "error", "limit"), "i64"), "peers": ("i64",) * ranks,
        "eps": "fp32", "rms_eps": "fp32", "num_warps": 8,
    }  # fmt: skip


def few_layers(
    d_model: int, channels: int, dt_rank: int, sequences: int, ranks: int = 1, rms: bool = False
) -> dict[str, Any]:
    """Of `gluon_layers_few`, on a GPU of 132 multiprocessors."""
    programs = decode_sizes.programs_of(d_model, 132)
    constants = decode_sizes.few_sizes(d_model, channels, dt_rank, 16, programs, ranks, sequences)
    assert constants is not None
    return {
        **constants, "RMS": rms, "anchor": "*i32", "table": "*i64", "hidden": "*bf16", "conv": "*bf16",
        "ssm": "*fp32", **dict.fromkeys(("words", "shared", "error", "limit"), "i64"),
        "peers": ("i64",) * ranks, "eps": "fp32", "rms_eps": "fp32", "num_warps": 8,
    }  # fmt: skip


class Case(NamedTuple):
    """A kernel to compile."""

    kernel: Any
    given: dict[str, Any]
    """Constants, types of parameters that are not as in POINTERS, and any of LAUNCH_OPTIONS."""
    op: str = ""
    """Whose rows of the tuning table to take the rest from."""
    architectures: tuple[int, ...] = (90, 80)


KERNELS: dict[str, Case] = {
    "causal_conv": Case(triton_conv._conv_kernel, CONV, "causal_conv"),
    "causal_conv, one sequence": Case(
        triton_conv._conv_kernel,
        {**CONV, "BLOCK_T": 16, "TILE": 16, "BLOCK_D": 128, "num_warps": 1, "BLOCK_S": 1}, "", (90,),
    ),
    "causal_conv_update": Case(triton_conv._conv_update_kernel, CONV, "causal_conv_update"),
    "selective_state_update": Case(triton_update._state_update_kernel, UPDATE, "selective_state_update"),
    "add_rms_norm": Case(triton_norm._add_rms_norm_kernel, NORM, "add_rms_norm"),
    "add_rms_norm, more columns": Case(
        triton_norm._add_rms_norm_kernel, {**NORM, "HAS_MORE": True}, "add_rms_norm"
    ),
    "gated_gelu": Case(
        triton_activation._gated_gelu_kernel,
        {**dict.fromkeys(("gate", "up"), "*bf16"), "BLOCK": 1024},
    ),
    "rms_normalize": Case(triton_norm._rms_normalize_kernel, ROWS),
    "largest": Case(triton_argmax._largest_kernel, LARGEST, "largest"),
    "largest of few rows": Case(triton_argmax._largest_kernel, {**LARGEST, "BLOCK": 1024}),
    "load_last": Case(
        triton_last_tokens._load_kernel, {**LAST, "next_places": "*i64", "narrow": "*i32"}, "", (90,)
    ),
    "store_last": Case(triton_last_tokens._store_kernel, LAST, "", (90,)),
    "attention in chunks": Case(
        triton_attention._chunk_kernel, {**HEAD, "PRECISION": "tf32"}, "paged_attention"
    ),
    "attention in parts": Case(triton_attention._part_kernel, {**HEAD, **PARTS}),
    "attention joined": Case(triton_attention._join_kernel, JOIN),
    "attention stored": Case(triton_attention._store_kernel, {**HEAD, "HEADS": 4, "num_warps": 8}),
    "attention in chunks, gluon": Case(
        gluon_attention.chunk_kernel,
        {"scale": "fp32", "PAGE": 16, "BLOCK": 512, "M": 64, "N": 64, "num_warps": 8}, "", (90,),
    ),
    "scan": Case(triton_scan._scan_kernel, SCAN),
    "scan, summary": Case(triton_scan._scan_kernel, {**SCAN, "CHUNK": 512, "SUMMARY": True}, "", (90,)),
    "scan, chunk": Case(triton_scan._scan_kernel, {**SCAN, "CHUNK": 512}, "", (90,)),
    "scan, 32 states": Case(triton_scan._scan_kernel, {**SCAN, "N": 32}, "", (90,)),
    "linear, 1 row": Case(triton_linear_kernels.vector_kernel, {**VECTOR, "TOKENS": 1}, "linear_1", (90,)),
    "linear, 4 rows": Case(
        triton_linear_kernels.vector_kernel, {**VECTOR, "K": 2560, "TOKENS": 4}, "linear_4"
    ),
    "linear, 4 rows, 2 heads": Case(
        triton_linear_kernels.vector_kernel, {**VECTOR, "K": 3712, "TOKENS": 4, "HEADS": 2}, "linear_4", (90,)
    ),
    "linear, 16 rows": Case(triton_linear_kernels.matrix_kernel, {**MATRIX, "BLOCK_T": 16}, "linear_16"),
    "linear, 64 rows": Case(triton_linear_kernels.matrix_kernel, {**MATRIX, "BLOCK_T": 64}),
    "linear, 64 rows dealt out": Case(
        triton_linear_kernels.matrix_kernel, {**MATRIX, "BLOCK_T": 16, "BLOCK_K": 128}, "", (90,)
    ),
    **{
        f"linear, 16 rows, held, {name}": Case(
            gluon_linear.few_rows_kernel,
            {
                "K": 5120, "SHARES": 4, "EIGHTS": 2, "HAS_BIAS": True, "WARPS": 4, "num_warps": 4,
                "uses": "*i32", "peers": ("i64",), "RANKS": 0, **given,
            }, "", (90,),
        )
        for name, given in {
            "shared": {}, "alone": {"K": 1280, "SHARES": 1, "EIGHTS": 1, "HAS_BIAS": False},
            "pushed": {"K": 2560, "RANKS": 2, "peers": ("i64",) * 2, "HAS_BIAS": False},
        }.items()
    },
    "projected update": Case(
        triton_projected_update._projected_update_kernel, PROJECTED, "projected_state_update"
    ),
    **{
        f"projected updates, {name}": Case(
            triton_projected_update_many._projected_updates_kernel, {**UPDATES, **given}, "", (90,)
        )
        for name, given in {
            "64 sequences": {}, "256 sequences": {"BLOCK_D": 32}, "no norms": {"RMS": False},
        }.items()
    },
    **{
        f"layers, {name}": Case(gluon_layers.layers_kernel, given, "", (90,))
        for name, given in {
            "mamba-2.8b": layers(2560, 5120, 160),
            "falcon-mamba-7b": layers(4096, 8192, 256, rms=True),
            "mamba-2.8b at degree 2": layers(2560, 2560, 160, 2),
            "falcon-mamba-7b at degree 4": layers(4096, 2048, 256, 4, rms=True),
            "zamba-7b": layers(3712, 7424, 232, heads=2, given=True, normed=False),
            "zamba-7b at degree 2": layers(3712, 3712, 232, 2, heads=2, given=True, normed=False),
            "zamba-7b at degree 4, last": layers(3712, 1856, 232, 4, heads=2, given=True),
            "mamba-2.8b at degree 8": layers(2560, 640, 160, 8),
        }.items()
    },
    **{
        f"few layers, {name}": Case(gluon_layers_few.few_layers_kernel, given, "", (90,))
        for name, given in {
            "mamba-2.8b": few_layers(2560, 5120, 160, 8),
            "four, mamba-2.8b": few_layers(2560, 5120, 160, 4),
            "mamba-2.8b at degree 2": few_layers(2560, 2560, 160, 8, 2),
            "mamba-2.8b at degree 4": few_layers(2560, 1280, 160, 8, 4),
            "falcon-mamba-7b": few_layers(4096, 8192, 256, 8, rms=True),
            "falcon-mamba-7b at degree 4": few_layers(4096, 2048, 256, 8, 4, rms=True),
        }.items()
    },
    "gluon": Case(gluon_scan.scan_kernel, GLUON, "", (90,)),
    "gluon, two ahead": Case(gluon_scan.scan_kernel, {**GLUON, "DEPTH": 2}, "", (90,)),
    "gluon, no polynomial": Case(gluon_scan.scan_kernel, {**GLUON, "EXTRA": 0}, "", (90,)),
    "gluon, first pass": Case(gluon_scan.scan_kernel, CHUNKED, "", (90,)),
    "gluon, second pass": Case(gluon_scan.scan_kernel, {**CHUNKED, "SECOND": True}, "", (90,)),
    "gluon, stream": Case(gluon_scan.scan_kernel, STREAM, "", (90,)),
    "gluon, stream, first pass": Case(gluon_scan.scan_kernel, STREAM_CHUNKED, "", (90,)),
    "gluon, stream, second pass": Case(gluon_scan.scan_kernel, {**STREAM_CHUNKED, "SECOND": True}, "", (90,)),
    "gluon, 32 states": Case(gluon_scan.scan_kernel, {**GLUON, "N": 32}, "", (90,)),
    "gluon, 64 states": Case(gluon_scan.scan_kernel, {**GLUON, "N": 64}, "", (90,)),
}


def compiled(
    kernel: Any, given: dict[str, Any], architecture: int, unaligned: tuple[str, ...] = ()
) -> CompiledKernel:
    """As the JIT compiles it for sizes and addresses that divide by 16, but for the unaligned ones."""
    options: dict[str, Any] = {"enable_fp_fusion": True}
    options |= {k: given[k] for k in LAUNCH_OPTIONS if k in given}
    types = {p.name: given.get(p.name, TYPES.get(p.name, "i32")) for p in kernel.params}
    constant = {p.name for p in kernel.params if p.is_constexpr or types[p.name] is None}
    constants = {(p.num,): given[p.name] for p in kernel.params if p.name in constant}
    aligned = [
        p.num
        for p in kernel.params
        if not (p.name in constant or p.do_not_specialize or types[p.name] == "fp32" or p.name in unaligned)
    ]
    source = (GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource)(
        fn=kernel,
        signature={p.name: "constexpr" if p.name in constant else types[p.name] for p in kernel.params},
        constexprs=constants,
        attrs={(n,): [["tt.divisibility", 16]] for n in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def inspected(kernel: CompiledKernel, *command: str) -> str:
    """What a tool of the CUDA toolkit says about the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout


def resources(kernel: CompiledKernel) -> dict[str, int]:
    """Registers and bytes of stack (spills) a thread."""
    usage = inspected(kernel, triton.knobs.nvidia.cuobjdump.path, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return {"registers": int(found[1]), "stack": int(found[2])}


def longest_loop(kernel: CompiledKernel) -> Counter[str]:
    """Instructions between a branch backwards and its target, by name."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    longest: list[str] = []
    for line in inspected(kernel, triton.knobs.nvidia.nvdisasm.path).splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([^;]+);", line):
            instructions.append(found[1].split()[0])
            back = re.search(r"BRA.*`\((\.L_\w+)\)", found[1])
            if back and len(instructions) - labels.get(back[1], len(instructions)) > len(longest):
                longest = instructions[labels[back[1]] :]
    return Counter(
        ".".join(name.split(".")[:2]) if name.startswith("MUFU") else name.split(".")[0] for name in longest
    )


def all_resources() -> Iterator[dict[str, Any]]:
    """What each kernel takes in the largest configuration of its op."""
    for name, case in KERNELS.items():
        for architecture in case.architectures:
            rows = tuning.TABLE.get(case.op, {architecture: [(0, {})]})[architecture]
            largest = next((c for _, c in reversed(rows) if c), {})
            config = next((c for limit, c in rows if limit == 2), largest)
            given = {"PDL": architecture >= 90, **case.given, **config}
            kernel = compiled(case.kernel, given, architecture)
            yield {"kernel": name, "sm": architecture, **resources(kernel)}


def ptx(request: dict[str, Any]) -> str:
    """Of a kernel for its first architecture, with `given` over its own."""
    case = KERNELS[request["kernel"]]
    given = {**case.given, **request["given"]}
    return compiled(case.kernel, given, case.architectures[0], tuple(request["unaligned"])).asm["ptx"]


def main(words: list[str]) -> Iterator[Any]:
    """A JSON document a line."""
    if words == ["ptx"]:
        yield from map(ptx, map(json.loads, sys.stdin))
    elif words[:1] == ["loop"]:
        for case in map(KERNELS.__getitem__, words[1:]):
            yield dict(longest_loop(compiled(case.kernel, case.given, case.architectures[0])).most_common())
    else:
        yield from all_resources()


if __name__ == "__main__":
    for document in main(sys.argv[1:]):
        print(json.dumps(document), flush=True)
