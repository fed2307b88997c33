"""Runs Triton's PTX on the CPU, so that the numbers of a GPU kernel can be checked where there is no GPU.

The subset is what Triton emits for kernels whose warps work by themselves, as those of `gluon_scan` do: one
entry, registers, loads and stores in global memory, branches, shuffles and tensor core products within a warp
(`ptx_arithmetic` lists the rest). There is no shared memory, no barrier, no atomic, no call and no local
memory. What is unknown raises `Unsupported` as the PTX is read, before anything runs.

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


MEMORY = re.compile(r"(ld\.param|ld\.global|st\.global)\.([bus](?:16|32|64)|f32)")
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
    if operation is None and opcode not in ("bra", "bra.uni", "ret") and not MEMORY.fullmatch(opcode):
        raise Unsupported(f"instruction {opcode}, in: {text}")
    if operation is not None and len(operands) != len(operation.reads) + len(operation.writes):
        raise Unsupported(f"{opcode} with {len(operands)} operands, in: {text}")
    if operation is None and opcode not in ("bra", "bra.uni", "ret") and len(operands) != 2:
        raise Unsupported(f"{opcode} of several elements, in: {text}")
    return Instruction(text, found[2] or "", found[1] == "!", opcode, operands, operation)


@dataclass
class Warps:
    """Warps at one place of the program; registers hold bits, an element a thread."""

    place: int
    registers: dict[str, Lanes]

    @property
    def threads(self) -> int:
        return len(self.registers["%tid.x"])

    def part(self, place: int, threads: Lanes) -> Warps:
        """Those of them with these threads, going on at `place`."""
        return Warps(place, {name: bits[threads] for name, bits in self.registers.items()})

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
        waiting = [Warps(0, {"%tid.x": thread % self.threads, "%ctaid.x": thread // np.uint32(self.threads)})]
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
            warps.registers = warps.part(0, ~taken).registers
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
