"""Machine code as nvdisasm prints it: instructions, the hot loop, and what one pass through it
issues and moves.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"\((\.L_x_\d+)\)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
MMA = re.compile(r"^(HMMA|QMMA|OMMA|HGMMA|QGMMA|UTC\w*MMA)")
STALLS = {"BAR.SYNC": 30, "MEMBAR": 40, "FENCE.VIEW.ASYNC": 20, "WARPGROUP.DEPBAR": 60}
"""Cycles that a barrier, a fence or a wait for a product holds a block up: round figures, which
nobody measured here.
"""
SLOW_CONVERSIONS = ("F2F", "F2I", "I2F", "MUFU")
SPILL = re.compile(r"^(STL|LDL)\b")


@dataclass(frozen=True)
class Instruction:
    """One instruction: address, opcode with its modifiers, operands."""

    address: int
    opcode: str
    operands: str


@dataclass(frozen=True)
class Code:
    """A kernel's machine code. ``loop``: the instructions of the hot loop, or all of them if there
    is none.
    """

    registers: int
    stack: int
    instructions: tuple[Instruction, ...]
    loop: tuple[Instruction, ...]
    has_loop: bool

    def families(self) -> list[str]:
        """Tensor-core instruction families present."""
        return sorted({m.group(1) for i in self.instructions if (m := MMA.match(i.opcode))})

    def mma_shapes(self) -> list[str]:
        """Tensor-core opcodes present, with their shapes and types."""
        return sorted({i.opcode for i in self.instructions if MMA.match(i.opcode)})

    def spills(self) -> int:
        """Loads and stores of spilled registers inside the hot loop."""
        return sum(bool(SPILL.match(i.opcode)) for i in self.loop)

    def kinds(self) -> dict[str, int]:
        """Issued instructions of the hot loop by kind, most frequent first."""
        return dict(Counter(_kind(i.opcode) for i in self.loop).most_common())

    def stall_cycles(self) -> int:
        """Cycles of one pass in which a block waits for its own warps, fences or products, as
        ``STALLS`` has them.
        """
        return sum(cycles for i in self.loop for opcode, cycles in STALLS.items() if i.opcode.startswith(opcode))

    def conversions(self) -> int:
        """Conversions of one pass that a multiprocessor does for 16 lanes a cycle."""
        return sum(i.opcode.startswith(SLOW_CONVERSIONS) for i in self.loop)

    def loop_bytes(self) -> int:
        """Bytes that a warp's global loads and stores name in one pass of the hot loop, predicates
        taken as true.
        """
        return sum(32 * _width(i.opcode) for i in self.loop if i.opcode.startswith(("LDG", "STG", "LDGSTS")))


def _kind(opcode: str) -> str:
    if MMA.match(opcode):
        return "mma"
    if opcode.startswith(("LDG", "STG", "UTMA", "UBLK")):
        return "global"
    if opcode.startswith(("LDS", "STS", "LDSM", "STSM", "LDTM", "STTM", "UTCCP", "TCGEN")):
        return "shared"
    if opcode.startswith(("F2F", "I2F", "F2I", "F2FP", "I2FP", "MUFU")):
        return "convert"
    if SPILL.match(opcode):
        return "spill"
    return (
        "float"
        if opcode.startswith(("FADD", "FMUL", "FFMA", "FSETP", "FSEL", "FMNMX", "HADD", "HMUL", "HFMA"))
        else "integer and control"
    )


def _width(opcode: str) -> int:
    for width, size in (
        (".256", 32),
        (".128", 16),
        (".64", 8),
        (".U16", 2),
        (".S16", 2),
        (".16", 2),
        (".U8", 1),
        (".S8", 1),
        (".8", 1),
    ):
        if width in opcode:
            return size
    return 4


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def inspect(cubin: bytes, *, looped: bool) -> Code:
    """Disassemble a cubin with the tools of the Triton wheel. ``looped``: whether the source has a
    loop over data.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([_tool("nvdisasm"), "-c", str(path)], capture_output=True, text=True, check=True).stdout  # noqa: S603
        usage = subprocess.run(  # noqa: S603
            [_tool("cuobjdump"), "-res-usage", str(path)], capture_output=True, text=True, check=True
        ).stdout
    found = _USAGE.search(usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]!r}")
    registers, stack, _, local = map(int, found.groups())
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            pending.append(label.group(1))
        elif match := _INSTRUCTION.search(line):
            labels.update(dict.fromkeys(pending, len(instructions)))
            pending.clear()
            instructions.append(Instruction(int(match.group(1), 16), match.group(2), match.group(3)))
    loops = _loops(instructions, labels)
    chosen = max(
        (x for x in loops if looped and x[3]), key=_heat, default=None
    )  # a loop without loads waits for a barrier
    loop = instructions if chosen is None else instructions[chosen[0] : chosen[1] + 1]
    return Code(registers, stack + local, tuple(instructions), tuple(loop), chosen is not None)


def _loops(instructions: list[Instruction], labels: dict[str, int]) -> list[tuple[int, int, int, int]]:
    """Backward branches: (first, last, tensor-core instructions, global loads). The endless loop
    that pads the end is left out, and so is a way back into the middle of another loop, from a wait
    that stands at the end.
    """
    found = []
    for last, instruction in enumerate(instructions):
        if not instruction.opcode.startswith("BRA"):
            continue
        target = _TARGET.search(instruction.operands)
        first = labels.get(target.group(1), last) if target else last
        if first < last:
            body = instructions[first : last + 1]
            mma = sum(bool(MMA.match(i.opcode)) for i in body)
            loads = sum(i.opcode.startswith(("LDG", "UTMALDG", "UBLKCP")) for i in body)
            if not any(begin < first <= end for begin, end, *_ in found):
                found.append((first, last, mma, loads))
    return found


def _heat(loop: tuple[int, int, int, int]) -> tuple[bool, int, int, int]:
    """Rank of a loop: most tensor-core work, most loads; then the shortest (the innermost of
    equals).
    """
    first, last, mma, loads = loop
    return (mma > 0, mma, loads, first - last)
