"""The inner loops of the register tiles (csrc/cpu/tile.h) compiled for arm64: instructions besides multiply-adds.

The tiles are instantiated from their header with the flags of the build; nothing is run.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The flags of CMakeLists.txt that affect the generated code.
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-schedule-insns")
# The largest tiles of products of whole panels.
PROBE = """
#include "csrc/cpu/tile.h"
using namespace xk::probe;
constexpr int kRows = max_gram_rows<float>(kMaxNR, 1), kTokens = max_mix_rows(kMaxNR, 1);
template void xk::probe::gram_tile<float, false, kRows, kMaxNR, 1>(const GramTile<float>&);
template void xk::probe::mix_tile<float, false, kTokens, kMaxNR, 1>(MixTile<float>&);
"""
FUNCTION = re.compile(r"^[0-9a-f]+ <.*::(gram|mix)_tile<float, false, (\d+), (\d+), 1>.*>:$")
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\t(\S+)\s*(.*)$")
BRANCHES = re.compile(r"b\.\w+|b|cbn?z|tbn?z")


@dataclass
class Loop:
    rows: int
    vectors: int
    instructions: list[tuple[int, str, str]]

    def count(self, name: str) -> int:
        return sum(op == name for _, op, _ in self.instructions)

    @property
    def per_multiply_add(self) -> float:
        return len(self.instructions) / self.count("fmla")

    @property
    def spills(self) -> int:
        return sum("[sp" in operands for _, _, operands in self.instructions)


def inner_loop(code: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """The loop without other branches that has the most multiply-adds; the longest one if there are several."""
    index = {address: i for i, (address, _, _) in enumerate(code)}
    bodies = []
    for i, (_, op, operands) in enumerate(code):
        target = re.search(r"([0-9a-f]+) <", operands)
        start = index.get(int(target[1], 16)) if target and BRANCHES.fullmatch(op) else None
        if start is not None and start <= i and not any(BRANCHES.fullmatch(op) for _, op, _ in code[start:i]):
            bodies.append(code[start : i + 1])
    return max(bodies, key=lambda body: (sum(op == "fmla" for _, op, _ in body), len(body)))


def compiled(folder: Path) -> dict[str, Loop]:
    source, output = folder / "probe.cpp", folder / "probe.o"
    source.write_text(PROBE)
    compile_ = ["aarch64-linux-gnu-g++", *FLAGS, "-Wno-psabi", "-DXK_LEVEL=probe", f"-I{ROOT}", "-c", str(source)]
    subprocess.run([*compile_, "-o", str(output)], check=True)
    command = ["aarch64-linux-gnu-objdump", "-dC", "--no-show-raw-insn", str(output)]
    functions: dict[tuple[str, int, int], list[tuple[int, str, str]]] = {}
    code: list[tuple[int, str, str]] = []
    for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
        if line.endswith(">:"):
            code = []
            if name := FUNCTION.match(line):
                functions[name[1], int(name[2]), int(name[3])] = code
        elif part := INSTRUCTION.match(line):
            code.append((int(part[1], 16), part[2], part[3]))
    return {kind: Loop(rows, vectors, inner_loop(code)) for (kind, rows, vectors), code in functions.items()}
