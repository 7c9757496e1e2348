"""Reads NVIDIA machine code: instructions, loops, and the global accesses in them. No GPU is needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
UNIT = 512
"""Bytes of one access of 16 bytes by each thread of a warp."""
SECTION = re.compile(r"^\.text\.([^:\s]+):")
LABEL = re.compile(r"^`?\(?(\.L_x_\d+)\)?:")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
ACCESS = re.compile(r"^(LDGSTS|LDG|STG)\b")
MULTIPLY = re.compile(r"^(HMMA|HGMMA|DMMA|QGMMA|IMMA|FFMA|DFMA|HFMA)")
ASYNCHRONOUS = re.compile(r"^HGMMA\S* +R\d+, *R(\d+), *gdesc")
"""A wgmma whose first operand is in registers."""
MOST_GROUPS = 8
NO_RESULT = re.compile(r"^(ST|RED|ATOM|LDGSTS|BAR|BRA|EXIT|HGMMA|WARPGROUP|\w*SETP|PLOP3|R2P|R2UR|U[A-Z])")
WIDTHS = {"128": 1.0, "64": 0.5, "U16": 0.125, "S16": 0.125, "U8": 0.0625, "S8": 0.0625}
"""Access sizes as fractions of 16 bytes a thread; those not named are of 4 bytes."""


class Instruction(NamedTuple):
    name: str
    operands: str

    @property
    def units(self) -> float:
        """Number of UNITs that this access moves if no thread is masked; 0 if it is none to global memory."""
        if not ACCESS.match(self.name):
            return 0.0
        return next((WIDTHS[part] for part in self.name.split(".") if part in WIDTHS), 0.25)

    @property
    def loads(self) -> bool:
        return self.name.startswith("LDG") and not self.name.startswith("LDGDEPBAR")

    @property
    def written(self) -> range:
        """The registers that it writes; those of a wgmma are left out."""
        if NO_RESULT.match(self.name) or not (first := re.match(r"(?:U?P(?:T|\d+), *)*R(\d+)\b", self.operands)):
            return range(0)
        if ".128" in self.name or self.name.startswith("HMMA") or re.match(r"LDSM.*\.4$", self.name):
            count = 4
        else:
            count = 1 + bool(re.search(r"\.64|\.WIDE|^D[A-Z]+$|F64\.|LDSM.*\.2$", self.name))
        return range(int(first[1]), int(first[1]) + count)


@dataclass(frozen=True)
class Code:
    """One kernel: its instructions and its loops."""

    instructions: tuple[Instruction, ...]
    loops: tuple[range, ...]

    @property
    def over_tokens(self) -> tuple[range, ...]:
        """The outermost loops that multiply what they load or store."""
        found = [r for r in self.loops if self.products(r) and self.units(r)]
        return tuple(r for r in found if not any(r != o and _within(r, o) for o in found))

    def executed(self, where: range, trips: int) -> int:
        """Number of instructions that one pass through `where` executes, each loop inside it taken `trips` times."""
        inner = [r for r in self.loops if r != where and _within(r, where)]
        outermost = [r for r in inner if not any(r != o and _within(r, o) for o in inner)]
        return len(where) + sum((trips - 1) * self.executed(r, trips) for r in outermost)

    def units(self, where: range) -> float:
        """UNITs of the accesses of one warp in `where`, each executed once, masked threads included."""
        return sum(self.instructions[i].units for i in where)

    def loaded(self, where: range) -> float:
        """The part of :meth:`units` that is loads."""
        return sum(self.instructions[i].units for i in where if self.instructions[i].loads)

    def ahead(self, where: range) -> int:
        """Number of iterations of a loop whose asynchronous copies are outstanding while a tile is used: what the
        loop's waits leave outstanding, over the groups that an iteration commits."""
        groups = sum(self.instructions[i].name.startswith("LDGDEPBAR") for i in where)
        waits = self.outstanding(where)
        return min(waits) // groups if groups and waits else 0

    def outstanding(self, where: range) -> list[int]:
        """Number of groups of asynchronous copies that each wait in `where` leaves outstanding."""
        waits = (self.instructions[i].operands for i in where if self.instructions[i].name.startswith("DEPBAR"))
        return [int(found[1], 16) for wait in waits if (found := re.search(r"SB0, (0x[0-9a-f]+)", wait))]

    def products(self, where: range) -> int:
        """Number of instructions in `where` that multiply tokens."""
        return sum(bool(MULTIPLY.match(self.instructions[i].name)) for i in where)

    def overwritten(self) -> list[str]:
        """Instructions that write to registers from which a wgmma still reads an operand: before the wait for it."""
        found = []
        for first, product in enumerate(self.instructions):
            operands = ASYNCHRONOUS.match(f"{product.name} {product.operands}")
            if operands:
                read = range(int(operands[1]), int(operands[1]) + 4)  # 16 bytes of each of 128 threads
                found += [f"{self.instructions[i]} after {product}" for i in self._written_before_wait(first, read)]
        return found

    def _written_before_wait(self, first: int, registers: range) -> set[int]:
        back = {loop[-1]: loop[0] for loop in self.loops}
        found: set[int] = set()
        seen: set[tuple[int, int]] = set()
        # younger: groups of wgmma that were started after that of the first; -1 while its own is not complete
        ways = [(first + 1, 0 if "gsb0" in self.instructions[first].operands else -1)]
        while ways:
            at, younger = ways.pop()
            while at < len(self.instructions) and (at, younger) not in seen:
                seen.add((at, younger))
                name, operands = self.instructions[at]
                younger += name.startswith("HGMMA") and "gsb0" in operands and younger < MOST_GROUPS
                if (wait := re.match(r"WARPGROUP.DEPBAR.LE gsb0, (0x[0-9a-f]+)", f"{name} {operands}")) and (
                    younger >= int(wait[1], 16)
                ):
                    break
                if any(register in registers for register in self.instructions[at].written):
                    found.add(at)
                    break
                if at in back:
                    ways.append((back[at], younger))
                at += 1
        return found


def _within(inner: range, outer: range) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop


def read(text: str) -> dict[str, Code]:
    """The kernels in the output of ``nvdisasm -c`` or ``cuobjdump -sass``, by symbol."""
    return {symbol: _code(lines) for symbol, lines in _sections(text)}


def _sections(text: str) -> Iterator[tuple[str, list[str]]]:
    symbol = ""
    lines: list[str] = []
    for line in map(str.strip, text.splitlines()):
        if found := SECTION.match(line) or re.match(r"^Function : (\S+)", line):
            if symbol:
                yield symbol, lines
            symbol, lines = found[1], []
        elif symbol:
            lines.append(line)
    if symbol:
        yield symbol, lines


def _code(lines: list[str]) -> Code:
    instructions: list[Instruction] = []
    places: dict[str, int] = {}
    for line in lines:
        if label := LABEL.match(line):
            places[label[1]] = len(instructions)
        elif found := INSTRUCTION.search(line):
            places[re.sub(r"^.*?/\*0*([0-9a-f]*)\*/.*$", r"0x\1", line)] = len(instructions)
            if found[1] != "NOP":
                instructions.append(Instruction(found[1], found[2]))
    loops = set()
    for last, instruction in enumerate(instructions):
        if instruction.name.startswith("BRA") and (to := re.findall(r"\.L_x_\d+|0x[0-9a-f]+", instruction.operands)):
            first = places.get(to[-1], last)
            if first < last:
                loops.add(range(first, last + 1))
    return Code(tuple(instructions), tuple(sorted(loops, key=lambda r: (r.start, -r.stop))))


def output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def of_cubin(cubin: bytes) -> tuple[Code, int]:
    """The only kernel of a binary, and its registers per thread."""
    (code,) = read(listing(cubin)).values()
    return code, usage(cubin)["REG"]


def listing(cubin: bytes) -> str:
    """The assembler of a binary."""
    return _said_of(cubin, "nvdisasm", "-c", "-ndf")


@cache
def usage(cubin: bytes) -> dict[str, int]:
    """Of the only kernel of a binary: REG, registers per thread; STACK and LOCAL, bytes per thread."""
    said = _said_of(cubin, "cuobjdump", "--dump-resource-usage")
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}


def _said_of(cubin: bytes, tool: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return output(TOOLS / tool, *options, file.name)
