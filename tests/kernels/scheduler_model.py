"""How many cycles a kernel's longest loop takes, by a model of one scheduler of a Hopper multiprocessor.

    python -m tests.kernels.scheduler_model TOKENS gluon "gluon, stream" ...

prints, for 1 to 6 warps on a scheduler, the cycles of an iteration divided by TOKENS. The machine code is
that of `ahead_of_time`. Each of its instructions says how many cycles its warp waits after it, which of six
barriers it sets, and which must be clear before it begins; the model keeps to that, issues one instruction a
cycle from any warp that is ready, and keeps pipes busy for the cycles of OCCUPIED.

It knows nothing of caches, of register banks, of shared memory's bank conflicts, nor of fetching code; global
memory answers after a fixed time. It serves to compare forms of a kernel, and to see what a warp waits for;
what it gives is a bound that a GPU under load misses by a fifth and more.
"""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import dataclass, field

import triton

from tests.kernels import ahead_of_time

OCCUPIED = {"special": 8, "fma": 1, "int_fma": 2, "alu": 2, "tensor": 8, "memory": 4, "none": 0}
"""Cycles that a warp's instruction keeps its pipe; that to memory is shared by four schedulers."""
QUEUE = {"special": 16, "memory": 24}
"""Cycles of work that may wait for a pipe without holding up the issue."""
LATENCY = {"MUFU": 26, "SHFL": 23, "LDS": 29, "LDG": 600}
"""From issue to a result, where the code waits for a barrier; of others ALSO."""
ALSO = 20
READ = 12
"""Until an instruction has read its operands."""
PIPES = {
    "special": "MUFU", "fma": "FFMA FMUL FADD", "int_fma": "IMAD", "tensor": "HMMA",
    "memory": "SHFL LDS STS LDG STG LDGSTS LDC",
    "none": "BRA NOP BAR DEPBAR LDGDEPBAR R2UR S2UR EXIT WARPSYNC",
}  # fmt: skip
WORDS = re.compile(r"^(?:LDS|STS|LDG|STG)\S*\.(64|128)")
LINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\S+\s+)?([^;]+);")
CODE = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/\s*$")


@dataclass(frozen=True)
class Instruction:
    """With its control bits, as NVIDIA's machine code has had them since Volta."""

    name: str
    pipe: str
    occupied: int
    stall: int
    sets: int
    """Barrier that its result clears; 7 for none."""
    frees: int
    """Barrier that clears when its operands are read."""
    waits: int
    """Mask of barriers."""


def instruction(text: str, high: int) -> Instruction:
    """From the disassembled text and the upper 64 bits of the code."""
    name, control = text.split()[0].split(".")[0], high >> 41
    pipe = next((p for p, names in PIPES.items() if name in names.split()), "alu")
    if pipe == "alu" and name.startswith("U"):  # the uniform data path
        pipe = "none"
    wide = WORDS.match(text)
    words = int(wide[1]) // 32 if wide else 1
    return Instruction(
        name,
        pipe,
        OCCUPIED[pipe] * words,
        control & 15,
        control >> 5 & 7,
        control >> 8 & 7,
        control >> 11 & 63,
    )


def longest_loop(code: str) -> list[Instruction]:
    """Between a branch backwards and its target, from nvdisasm -hex."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    longest, text = slice(0, 0), ""
    for line in code[code.index("\n.text.") :].splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(found)
        elif first := LINE.match(line):
            text = first[1].strip()
        elif text and (second := CODE.match(line)):
            found.append(instruction(text, int(second[1], 16)))
            back = re.search(r"BRA.*`\((\.L_\w+)\)", text)
            start = labels.get(back[1], len(found)) if back else len(found)
            if len(found) - start > longest.stop - longest.start:
                longest = slice(start, len(found))
            text = ""
    return found[longest]


@dataclass
class Warp:
    ready: int
    place: int = 0
    barriers: list[list[int]] = field(default_factory=lambda: [[] for _ in range(6)])

    def blocked(self, waits: int, now: int) -> bool:
        return any(waits >> n & 1 and max(times, default=0) > now for n, times in enumerate(self.barriers))


def cycles(loop: list[Instruction], warps: int, rounds: int = 40) -> float:
    """Of an iteration of all warps, once they have drifted apart."""
    busy = dict.fromkeys(OCCUPIED, 0)
    team = [Warp(ready=7 * n) for n in range(warps)]
    ended: list[int] = []
    for now in itertools.count():
        for warp in team:
            step = loop[warp.place]
            if warp.ready > now or warp.blocked(step.waits, now):
                continue
            if busy[step.pipe] > now + QUEUE.get(step.pipe, 0):
                continue
            _issue(warp, step, now, busy)
            warp.place = (warp.place + 1) % len(loop)
            if warp.place == 0:
                ended.append(now)
            if (
                warp is not team[0]
            ):  # it goes on as long as it can; then comes the one that has waited longest
                team.append(team.pop(0))
                team.remove(warp)
                team.insert(0, warp)
            break
        if len(ended) == rounds * warps:
            counted = ended[len(ended) // 4 :]
            return (counted[-1] - counted[0]) / (len(counted) - 1) * warps
    raise AssertionError


def _issue(warp: Warp, step: Instruction, now: int, busy: dict[str, int]) -> None:
    begins = max(now, busy[step.pipe])
    busy[step.pipe] = begins + step.occupied
    for n in range(6):
        if step.waits >> n & 1:
            warp.barriers[n].clear()
    if step.sets != 7:
        warp.barriers[step.sets].append(begins + LATENCY.get(step.name, ALSO))
    if step.frees != 7:
        warp.barriers[step.frees].append(begins + READ)
    warp.ready = now + max(1, step.stall)


def main(tokens: int, names: list[str]) -> None:
    for name in names:
        case = ahead_of_time.KERNELS[name]
        kernel = ahead_of_time.compiled(case.kernel, case.given, case.architectures[0])
        code = ahead_of_time.inspected(kernel, triton.knobs.nvidia.nvdisasm.path, "-hex")
        loop = longest_loop(code)
        print(name, [round(cycles(loop, warps) / tokens) for warps in range(1, 7)], flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
