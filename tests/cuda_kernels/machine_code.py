"""What the assembler made of each kernel of the CUDA module: ptxas.log of its build, and its instructions.

No GPU is needed, and nothing is compiled. `tool` finds cuobjdump.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

COMPILED = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
NUMBERS = {
    "stack": re.compile(r"(\d+) bytes stack frame"),
    "spill stores": re.compile(r"(\d+) bytes spill stores"),
    "spill loads": re.compile(r"(\d+) bytes spill loads"),
    "registers": re.compile(r"Used (\d+) registers"),
    "shared": re.compile(r"(\d+) bytes smem"),  # static; what a launch asks for comes on top
}
# Tensor cores, asynchronous copies, stores, loads of matrices, and accesses at generic addresses.
INSTRUCTION = re.compile(r" ((?:[HDIQ]G?MMA|UTC\w*MMA|LDGSTS|STG|LDSM|LD|ST)(?:\.\w+)*) ")
PLACED = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);")
BRANCH = re.compile(r"\bBRA\b.* 0x([0-9a-f]+)")
MOVED = re.compile(r"\b(?:LDG|STG)\.E(\S*)")
TENSOR_CORE = r"[HDIQ]G?MMA|UTC\w*MMA"
NAME = re.compile(r"_ZN2xk4cuda\d+(\w+?_kernel)(?:I(\w*?)EEv|E)")
DTYPES = {"13__nv_bfloat16": "bf16", "6__half": "f16", "f": "f32"}


@dataclass
class Kernel:
    symbol: str
    arch: str
    numbers: dict[str, int] = field(default_factory=dict)
    instructions: Counter[str] = field(default_factory=Counter)
    loop: list[float] = field(default_factory=list)
    """The instructions of the loop that moves most and uses tensor cores, and the bytes that a warp moves in it."""

    def __post_init__(self) -> None:
        name = NAME.match(self.symbol)
        assert name, f"{self.symbol} is not named as the kernels are"
        self.kind, arguments = name[1], name[2] or "f"  # what is no template is of fp32
        first = re.match("|".join(DTYPES), arguments)
        assert first, f"{self.symbol}: of which dtype?"
        self.dtype = DTYPES[first[0]]
        self.product = ""
        if self.kind.startswith("fragment_"):
            self.product = "fragments"
        elif self.kind.startswith("fused_"):
            self.product = "fma" if self.dtype == "f32" else "tensor core"
        numbers = [int(number) for number in re.findall(r"Li(\d+)E", arguments + "E")]
        self.width = numbers[0] if numbers else 0
        self.outputs, self.adds = numbers[1:] or (1, 0)

    def __str__(self) -> str:
        outputs = f"{self.outputs} results" if self.outputs > 1 else "with a term added" if self.adds else ""
        parts = filter(None, (self.dtype, self.product, str(self.width or ""), outputs))
        return f"{self.kind.removesuffix('_kernel')} ({', '.join(parts)}) of {self.arch}"

    @property
    def loop_instructions(self) -> float:
        """For 512 bytes that are read for the first time, or written.

        The two warps that share the 64 features of a Gram matrix read three operands for two; of three gradients, two
        are added to what is read once more, also where each is of a launch of its own.
        """
        twice = 3 / 2 if self.kind == "fragment_gram_kernel" and self.width == 64 else 8 / 6 if self.adds else 1
        count, moved = self.loop
        return twice * count / (moved / 512)

    def having(self, pattern: str) -> list[str]:
        return sorted(name for name in self.instructions if re.match(pattern, name))


def tool(name: str = "cuobjdump") -> str | None:
    """On PATH, in the CUDA toolkit, or in the wheel of Triton."""
    folders = [None]
    if nvcc := shutil.which("nvcc"):
        folders += [str(Path(nvcc).resolve().parent), "/usr/local/cuda/bin"]
    if triton := find_spec("triton"):
        folders += [str(Path(folder) / "backends" / "nvidia" / "bin") for folder in triton.submodule_search_locations]
    return next(filter(None, (shutil.which(name, path=folder) for folder in folders)), None)


def read_log(lines: Iterator[str]) -> dict[tuple[str, str], Kernel]:
    """By symbol and architecture. Each of a symbol's weak copies, one in each file that uses it, must be alike."""
    found: dict[tuple[str, str], Kernel] = {}
    kernel = None
    for line in lines:
        if compiled := COMPILED.search(line):
            symbol, arch = compiled.groups()
            kernel = found.setdefault((symbol, arch), Kernel(symbol, arch))
        elif kernel:
            for name, pattern in NUMBERS.items():
                if number := pattern.search(line):
                    kernel.numbers[name] = max(kernel.numbers.get(name, 0), int(number[1]))
    return found


def main_loop(code: list[tuple[int, str]]) -> list[float]:
    """See :class:`Kernel`. A loop is what a branch goes back over.

    What a branch in it leaves out, and writes to shared memory, is done every other time: sums of fp32 are put aside.
    """
    places = {address: i for i, (address, _) in enumerate(code)}
    targets = [BRANCH.search(text) for _, text in code]
    to = [places.get(int(target[1], 16), i) if target else i for i, target in enumerate(targets)]
    best = [0.0, 0.0]
    for i, begin in enumerate(to):
        if begin < i and any("MMA" in inside for _, inside in code[begin:i]):
            seldom = {
                at
                for branch in range(begin, i)
                if branch < to[branch] <= i and any("STS" in text for _, text in code[branch : to[branch]])
                for at in range(branch + 1, to[branch])
            }
            moves = filter(None, (MOVED.search(inside) for _, inside in code[begin:i]))
            moved = 32 * sum(16 if ".128" in move[1] else 8 if ".64" in move[1] else 4 for move in moves)
            best = max(best, [i + 1 - begin - 0.5 * len(seldom), moved], key=lambda loop: loop[1])
    return best if best[1] else []


def read_instructions(cuobjdump: str, module: Path, arch: str) -> dict[str, list[Any]]:
    """How often the instructions that matter occur, and the main loop of kernels that have one, by symbol."""
    found: dict[str, list[Any]] = {}
    counts: Counter[str] = Counter()
    code: list[tuple[int, str]] = []
    looked_at = False
    with subprocess.Popen([cuobjdump, "-sass", "-arch", arch, module], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "Function : " in line:
                # weak copies in several files have the same code
                symbol = line.split()[-1]
                counts, code = Counter(), []
                found[symbol] = [counts, code]
                looked_at = "fragment_" in symbol
                continue
            if instruction := INSTRUCTION.search(line, 0, 100):
                counts[instruction[1]] += 1
            if looked_at and (placed := PLACED.match(line)):
                code.append((int(placed[1], 16), placed[2]))
    assert process.returncode == 0, f"cuobjdump ended with {process.returncode}"
    return {symbol: [counts, main_loop(code)] for symbol, (counts, code) in found.items()}


def kernels(log: Path) -> list[Kernel]:
    with log.open() as lines:
        found = read_log(lines)
    return sorted(found.values(), key=lambda kernel: (kernel.symbol, kernel.arch))


def disassemble(found: list[Kernel], module: Path, cuobjdump: str, kept: Path) -> None:
    """Fills in `instructions`, which take many seconds: `kept` is a file that has them while the module is the same."""
    digest = sha256(module.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    before = json.loads(kept.read_text()) if kept.exists() else {}
    if before.get("digest") == digest:
        read = before["instructions"]
    else:
        archs = sorted({kernel.arch for kernel in found})
        with ThreadPoolExecutor(2) as pool:
            each = list(pool.map(lambda arch: read_instructions(cuobjdump, module, arch), archs))
        read = dict(zip(archs, each, strict=True))
        kept.write_text(json.dumps({"digest": digest, "instructions": read}))
    for kernel in found:
        counts, kernel.loop = read[kernel.arch][kernel.symbol]
        kernel.instructions = Counter(counts)
