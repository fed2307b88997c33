"""Compiles the Triton kernels for a GPU that need not be there, and prints their resources as JSON.

Run as a program, without TRITON_INTERPRET: `test_ahead_of_time.py` does, since a process either interprets or
compiles.
"""

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssm_dist.kernels import triton_attention, triton_conv, triton_norm, triton_update, tuning

POINTERS = {
    "*bf16": ["weight", "bias", "x", "y", "dt", "B", "C", "z", "branch", "query", "key", "value", "key_pages",
              "value_pages"],
    "*fp32": ["A_log", "D", "dt_bias", "residual", "total", "sums", "tops", "totals"],
    "*i32": ["seq_offsets", "slots", "pages"],
    "*i64": ["positions"],
}  # fmt: skip
"""Types and the kernels' parameters that have them; what is not named is an integer."""
TYPES = {name: kind for kind, names in POINTERS.items() for name in names}

CONV = {"WIDTH": 4, "HAS_BIAS": True, "BLOCK_S": 256, "state": "*bf16"}
UPDATE = {"N": 16, "ONE_GROUP": True, "state": "*fp32"}
NORM = {"HAS_BRANCH": True, "HAS_RESIDUAL": True, "BLOCK": 4096, "eps": "fp32"}
ROWS = {"ROWS": 4, "BLOCK": 256, "eps": "fp32"}
HEAD = {"BLOCK": 512, "BLOCK_S": 32, "scale": "fp32", "num_warps": 2}
PARTS = {"PARTS": 64, "BLOCK_N": 8, "num_warps": 1}
JOIN = {"PARTS": 64, "BLOCK": 128, "BLOCK_P": 32}

KERNELS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "causal_conv": (triton_conv._conv_kernel, CONV, "causal_conv"),
    "causal_conv_update": (triton_conv._conv_update_kernel, CONV, "causal_conv_update"),
    "selective_state_update": (triton_update._state_update_kernel, UPDATE, "selective_state_update"),
    "add_rms_norm": (triton_norm._add_rms_norm_kernel, NORM, "add_rms_norm"),
    "rms_normalize": (triton_norm._rms_normalize_kernel, ROWS, ""),
    "attention in chunks": (triton_attention._chunk_kernel, {**HEAD, "PRECISION": "tf32"}, "paged_attention"),
    "attention in parts": (triton_attention._part_kernel, {**HEAD, **PARTS}, ""),
    "attention joined": (triton_attention._join_kernel, JOIN, ""),
    "attention stored": (triton_attention._store_kernel, HEAD, ""),
}
"""Kernel, constants and unusual types, and the rows of the tuning table to take the rest from."""


def resources(kernel: Any, given: dict[str, Any], architecture: int) -> dict[str, int]:
    """Registers and bytes of stack (spills) a thread, at sizes and addresses divisible by 16."""
    options = {k: given[k] for k in ("num_warps", "num_stages") if k in given}
    types = {p.name: given.get(p.name, TYPES.get(p.name, "i32")) for p in kernel.params}
    constants = {(p.num,): given[p.name] for p in kernel.params if p.is_constexpr}
    aligned = [p.num for p in kernel.params if not p.is_constexpr and types[p.name] != "fp32"]
    source = ASTSource(
        fn=kernel,
        signature={p.name: "constexpr" if p.is_constexpr else types[p.name] for p in kernel.params},
        constexprs=constants,
        attrs={(n,): [["tt.divisibility", 16]] for n in aligned},
    )
    options["enable_fp_fusion"] = True
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return {"registers": int(found[1]), "stack": int(found[2])}


def main(architectures: list[int]) -> None:
    """The largest configuration of every op, a line of JSON each."""
    for name, (kernel, given, op) in KERNELS.items():
        for architecture in architectures:
            rows = tuning.TABLE.get(op, {architecture: [(0, {})]})
            config = next((c for limit, c in rows[architecture] if limit == 2), rows[architecture][-1][1])
            found = resources(kernel, {**given, **config}, architecture)
            print(json.dumps({"kernel": name, "sm": architecture, **found}), flush=True)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
