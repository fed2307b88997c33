"""Compiles the scans for a GPU that need not be there, and prints what their variants take as JSON.

Run as a program, without TRITON_INTERPRET, as `test_scan_ahead_of_time.py` does.
"""

import json
import re
import subprocess
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from ssm_dist.kernels import gluon_scan, triton_scan

PLAIN = {"N": 16, "BLOCK": triton_scan.BLOCK, "CHUNK": 0, "BLOCK_S": 1, "SUMMARY": False, "WARPS": 1}
GLUON = {"N": 16, "WARPS": 4, "DEPTH": 1, "EXTRA": 1, "CHUNKED": False, "SECOND": False}
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (90, PLAIN),
    "plain summary": (90, PLAIN | {"CHUNK": 512, "SUMMARY": True}),
    "plain chunk": (90, PLAIN | {"CHUNK": 512}),
    "plain sm_80": (80, PLAIN),
    "plain 32 states": (90, PLAIN | {"N": 32}),
    "gluon": (90, GLUON),
    "gluon two ahead": (90, GLUON | {"DEPTH": 2}),
    "gluon no polynomial": (90, GLUON | {"EXTRA": 0}),
    "gluon first pass": (90, GLUON | {"CHUNKED": True, "DEPTH": 2}),
    "gluon second pass": (90, GLUON | {"CHUNKED": True, "SECOND": True, "DEPTH": 2}),
    "gluon 32 states": (90, GLUON | {"N": 32}),
    "gluon 64 states": (90, GLUON | {"N": 64}),
}
ACTIVATIONS = ("x", "dt", "z", "B", "C", "y")
INTEGERS = ("seq_offsets", "slots")
COUNTS = ("sequences", "chunk", "group_blocks")


def compiled(architecture: int, constants: dict[str, Any]) -> triton.compiler.CompiledKernel:
    """A variant for bfloat16 activations, float32 states and strides that are multiples of 16."""
    gluon = "DEPTH" in constants
    kernel = gluon_scan.scan_kernel if gluon else triton_scan._scan_kernel
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = "*bf16" if name in ACTIVATIONS else "*i32" if name in INTEGERS else "*fp32"
        signature[name] = pointer if place < kernel.arg_names.index("sequences") else "i32"
        if name not in COUNTS:
            attributes[(place,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = (GluonASTSource if gluon else ASTSource)(kernel, signature, constants, attributes)
    options = {"num_warps": constants.get("WARPS", 1), "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(kernel: triton.compiler.CompiledKernel) -> dict[str, int]:
    """Registers a thread and bytes of stack, where spilt registers would go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return {"registers": int(found[1]), "stack": int(found[2])}


if __name__ == "__main__":
    print(json.dumps({name: resources(compiled(*variant)) for name, variant in VARIANTS.items()}))
