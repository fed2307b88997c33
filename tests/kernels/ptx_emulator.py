"""Runs Triton's PTX on the CPU, so that the numbers of a GPU kernel can be checked where there is no GPU.

The subset is what Triton emits for kernels whose warps work by themselves, as those of `gluon_scan` do: one
entry, registers, loads and stores in global memory, branches, shuffles and tensor core products within a warp
(`ptx_arithmetic` lists the rest); and for blocks of one warp, asynchronous copies to shared memory and loads
from there (`ptx_shared`). There is no atomic, no call and no local memory. What is unknown raises
`Unsupported` as the PTX is read, before anything runs.

Threads of a warp run in lockstep: each instruction is done by all lanes at once, and a branch that lanes
decide differently is unsupported. Warps of a launch, of all blocks, run together until a branch parts them;
then each part runs to its end by itself. A GPU would be free to choose that order, and any other.

Checked besides: every load and store is aligned and lies within a tensor that was given, and nothing is read
from a register that was never written or that has another width.

It cannot show: races between warps, since it has a single order; the errors of approximate instructions,
which are exact here; how tensor cores round sums; what ptxas makes of the PTX (registers, spills, its order
of instructions); nor how long anything takes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.kernels.ptx_arithmetic import OPERATIONS, TYPES, Lanes, Operation
from tests.kernels.ptx_shared import Copy, Shared

UNSIGNED = {1: np.bool_, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""Type of a register's array by its bytes; predicates have one."""
WARP = 32
GAP = 256
"""Bytes around each tensor that no address may fall on; a divisor of every tensor's address."""


class Unsupported(NotImplementedError):
    """PTX that the emulator does not know."""


class Memory:
    """Global memory: copies of the storages of some tensors, with gaps between them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        storages = [t.untyped_storage() for t in tensors]
        self.storages = {s._cdata: torch.empty(0, dtype=torch.uint8).set_(s) for s in storages}
        self.starts: dict[int, int] = {}
        top = GAP
        for key, raw in self.storages.items():
            self.starts[key] = top
            top += -(-raw.numel() // GAP) * GAP + GAP
        self.bytes = np.zeros(top, np.uint8)
        self.given = np.zeros(top, np.bool_)
        for key, raw in self.storages.items():
            self.bytes[self.starts[key] :][: raw.numel()] = raw.numpy()
            self.given[self.starts[key] :][: raw.numel()] = True

    def address(self, tensor: Tensor) -> int:
        """Of the tensor's first element."""
        start = self.starts[tensor.untyped_storage()._cdata]
        return start + int(tensor.storage_offset()) * tensor.element_size()

    def copy_back(self) -> None:
        """Into the tensors that it was made of."""
        for key, raw in self.storages.items():
            raw.copy_(torch.from_numpy(self.bytes[self.starts[key] :][: raw.numel()].copy()))

    def cells(self, addresses: Lanes, size: int) -> Lanes:
        """Places of elements of `size` bytes at these addresses, in `bytes` seen as such elements."""
        if (addresses % size).any():
            raise IndexError("an address is not a multiple of what is read or written there")
        inside = (addresses >= 0) & (addresses + size <= len(self.given))
        if not inside.all() or not self.given[addresses[:, None] + np.arange(size)].all():
            raise IndexError("an address lies outside all tensors")
        return addresses // size


@dataclass(frozen=True)
class Instruction:
    """One line of the program; `operation` is None for control flow and memory."""

    text: str
    guard: str
    """The predicate register under which lanes take part, or nothing."""
    unless: bool
    """Whether they take part where it is false."""
    opcode: str
    operands: tuple[str, ...]
    operation: Operation | None


MEMORY = re.compile(r"(ld\.param|ld\.global|st\.global|ld\.shared)\.(?:v[24]\.)?([bus](?:16|32|64)|f32)")
CONTROL = ("bra", "bra.uni", "ret")
COPIES = {
    "cp.async.ca.shared.global": 4, "cp.async.cg.shared.global": 4, "cp.async.commit_group": 0,
    "cp.async.wait_group": 1, "bar.sync": 1,
}  # fmt: skip
"""Numbers of operands of what a block of one warp does with its shared memory."""
STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.]*)\s*(.*)", re.DOTALL)
ADDRESS = re.compile(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]")


def _instruction(text: str) -> Instruction:
    found = STATEMENT.fullmatch(text)
    if found is None:
        raise Unsupported(text)
    opcode, groups = found[3], re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", found[4])
    operands = tuple(word for group in groups for word in re.findall(r"\[[^\]]*\]|[^,\s{}]+", group))
    name = opcode
    if opcode == "mov.b32" and len(operands) == 3:
        name = "mov.b32 unpack" if groups[0].startswith("{") else "mov.b32 pack"
    operation = OPERATIONS.get(name)
    if operation is None and opcode not in (*CONTROL, *COPIES) and not MEMORY.fullmatch(opcode):
        raise Unsupported(f"instruction {opcode}, in: {text}")
    if operation is not None and len(operands) != len(operation.reads) + len(operation.writes):
        raise Unsupported(f"{opcode} with {len(operands)} operands, in: {text}")
    several = {"v2": 3, "v4": 5}.get(opcode.split(".")[2] if opcode.startswith("ld.shared.v") else "", 2)
    if operation is None and opcode not in CONTROL and len(operands) != COPIES.get(opcode, several):
        raise Unsupported(f"{opcode} of {len(operands)} operands, in: {text}")
    return Instruction(text, found[2] or "", found[1] == "!", opcode, operands, operation)


@dataclass
class Warps:
    """Warps at one place of the program; registers hold bits, an element a thread."""

    place: int
    registers: dict[str, Lanes]
    shared: Shared | None
    """None for blocks of several warps, which may part."""

    @property
    def threads(self) -> int:
        return len(self.registers["%tid.x"])

    def part(self, place: int, threads: Lanes) -> Warps:
        """Those of them with these threads, going on at `place`."""
        registers = {name: bits[threads] for name, bits in self.registers.items()}
        return Warps(place, registers, self.shared and self.shared.part(threads))

    def read(self, operand: str, kind: str) -> Lanes:
        """A register or a constant as PTX type `kind`."""
        size = np.dtype(TYPES[kind]).itemsize
        if operand.startswith("%"):
            if operand not in self.registers:
                raise Unsupported(f"register {operand} is read before it is written, or is a special one")
            bits = self.registers[operand]
            if bits.dtype.itemsize != size:
                raise Unsupported(f"register {operand} read as {kind}")
            return bits.view(TYPES[kind])
        if operand == "global_smem":
            operand = "0"
        number = int(operand[2:], 16) if operand.startswith("0f") else int(operand.rstrip("U"), 0)
        if kind == "pred":
            return np.full(self.threads, bool(number))
        return np.full(self.threads, number & (1 << 8 * size) - 1, UNSIGNED[size]).view(TYPES[kind])

    def guard(self, instruction: Instruction) -> Lanes:
        """Which threads take part."""
        if not instruction.guard:
            return np.ones(self.threads, np.bool_)
        return self.read(instruction.guard, "pred") ^ instruction.unless

    def write(self, operand: str, value: Lanes, taking_part: Lanes) -> None:
        """The others keep what they have, which must be something."""
        bits: Lanes = np.ascontiguousarray(value).view(UNSIGNED[value.dtype.itemsize])
        if not taking_part.all():
            bits = np.where(taking_part, bits, self.read(operand, f"b{8 * bits.dtype.itemsize}"))
        self.registers[operand] = bits


class Kernel:
    """An entry of a PTX module."""

    def __init__(self, ptx: str) -> None:
        entry = re.search(r"\.entry \w+\((.*?)\)(.*?)\n\{\n(.*?)\n\}", ptx, re.DOTALL)
        threads = entry and re.search(r"\.reqntid (\d+)", entry[2])
        if not entry or not threads:
            raise Unsupported("PTX without an entry of a given number of threads")
        self.parameters = re.findall(r"\w+_param_\d+", entry[1])
        self.threads = int(threads[1])
        self.labels: dict[str, int] = {}
        self.program: list[Instruction] = []
        for line in re.sub(r"//[^\n]*", "", entry[3]).splitlines():
            label = re.fullmatch(r"\s*(\$\w+):\s*", line)
            if label:
                self.labels[label[1]] = len(self.program)
                continue
            for statement in (part.strip() for part in line.split(";")):
                if statement and statement not in "{}" and not statement.startswith("."):
                    self.program.append(_instruction(statement))

    def launch(self, blocks: int, arguments: Sequence[Tensor | int]) -> None:
        """Runs a grid of so many blocks; the parameters left over, Triton's own, become 0."""
        memory = Memory([a for a in arguments if isinstance(a, Tensor)])
        values = [memory.address(a) if isinstance(a, Tensor) else a for a in arguments]
        values += [0] * (len(self.parameters) - len(values))
        parameters = dict(zip(self.parameters, values, strict=True))
        thread = np.arange(blocks * self.threads, dtype=np.uint32)
        registers = {"%tid.x": thread % self.threads, "%ctaid.x": thread // np.uint32(self.threads)}
        waiting = [Warps(0, registers, Shared(blocks) if self.threads == WARP else None)]
        with np.errstate(all="ignore"):
            while waiting:
                warps = waiting.pop()
                while warps.threads:
                    instruction = self.program[warps.place]
                    warps.place += 1
                    if instruction.opcode == "ret":
                        break
                    if instruction.opcode.startswith("bra"):
                        waiting.append(self._branch(warps, instruction))
                    else:
                        _execute(warps, instruction, parameters, memory)
        memory.copy_back()

    def _branch(self, warps: Warps, instruction: Instruction) -> Warps:
        """Takes those that stay; gives back those that go their own way, if any."""
        taken, target = warps.guard(instruction), self.labels[instruction.operands[0]]
        if taken.all():
            warps.place = target
            return warps.part(target, ~taken)
        together = taken.reshape(-1, WARP)
        if (together.any(1) != together.all(1)).any():
            raise Unsupported(f"lanes of a warp part at: {instruction.text}")
        parted = warps.part(target, taken)
        if parted.threads:
            stayed = warps.part(0, ~taken)
            warps.registers, warps.shared = stayed.registers, stayed.shared
        return parted


def _execute(warps: Warps, instruction: Instruction, parameters: dict[str, int], memory: Memory) -> None:
    """An instruction that is not control flow."""
    operation, operands = instruction.operation, instruction.operands
    taking_part = warps.guard(instruction)
    if operation is not None:
        targets, sources = operands[: len(operation.writes)], operands[len(operation.writes) :]
        result = operation.function(*map(warps.read, sources, operation.reads))
        for target, value in zip(targets, result if len(targets) > 1 else (result,), strict=True):
            warps.write(target, value, taking_part)
        return
    if instruction.opcode in COPIES or instruction.opcode.startswith("ld.shared"):
        return _share(warps, instruction, memory)
    action, kind = MEMORY.fullmatch(instruction.opcode).groups()  # type: ignore[union-attr]
    size = np.dtype(TYPES[kind]).itemsize
    place = ADDRESS.fullmatch(operands[0 if action == "st.global" else 1])
    if place is None:
        raise Unsupported(instruction.text)
    if action == "ld.param":
        value = np.full(warps.threads, parameters[place[1]] & (1 << 8 * size) - 1, UNSIGNED[size])
        warps.write(operands[0], value, taking_part)
        return
    addresses = (warps.read(place[1], "s64") + int(place[2] or 0))[taking_part]
    cells = memory.cells(addresses, size)
    view: Lanes = memory.bytes.view(UNSIGNED[size])
    if action == "st.global":
        view[cells] = warps.read(operands[1], kind).view(UNSIGNED[size])[taking_part]
        return
    value = np.zeros(warps.threads, UNSIGNED[size])
    value[taking_part] = view[cells]
    warps.write(operands[0], value, taking_part)


def _share(warps: Warps, instruction: Instruction, memory: Memory) -> None:
    """A load from shared memory, or a step of copying there."""
    shared, operands, name = warps.shared, instruction.operands, instruction.opcode
    taking_part = warps.guard(instruction)
    if shared is None or (not taking_part.all() and not name.startswith("cp.async.c")):
        raise Unsupported(f"shared memory of several warps, or of some lanes: {instruction.text}")
    if name.startswith("ld.shared"):
        *targets, place = operands
        kind = MEMORY.fullmatch(name)[2]  # type: ignore[index]
        size = np.dtype(TYPES[kind]).itemsize
        found = shared.load(_addresses(warps, place, "s32"), size * len(targets))
        for n, target in enumerate(targets):
            bits = np.ascontiguousarray(found[:, n * size : (n + 1) * size]).view(UNSIGNED[size])[:, 0]
            warps.write(target, bits, taking_part)
    elif name == "cp.async.commit_group":
        shared.commit()
    elif name == "cp.async.wait_group":
        shared.wait(int(operands[0]), memory.bytes, memory.given)
    elif name != "bar.sync":
        target, source = _addresses(warps, operands[0], "s32"), _addresses(warps, operands[1], "s64")
        given = warps.read(operands[3], "u32").astype(np.int64)
        shared.latest.append(Copy(target, source, int(operands[2], 0), given, taking_part))


def _addresses(warps: Warps, operand: str, kind: str) -> Lanes:
    place = ADDRESS.fullmatch(operand)
    if place is None:
        raise Unsupported(operand)
    return warps.read(place[1], kind).astype(np.int64) + int(place[2] or 0)
