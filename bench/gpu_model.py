"""A model of each launch on an H100 and an H200: ``python -m bench.gpu_model [--write docs/gpu.md]``.

Needs no GPU: calls are recorded by the driver of :mod:`bench.host`, which launches nothing, and their machine code is
read. The model is made to be refuted line by line: ``python -m bench.gpu_kernels`` has the same launches by the clock.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from bench import gpu_launches, sass
from bench.gpu_launches import Recorded
from bench.machine import ROOT
from bench.workloads import OP_SHAPES, OpShape

BEGIN, END = "<!-- gpu-model: python -m bench.gpu_model --write docs/gpu.md -->", "<!-- end of gpu-model -->"
SHAPES = OP_SHAPES["gpu"][:2]
LAYER = OpShape(SHAPES[0].B, SHAPES[0].N, 1, SHAPES[0].channels)
"""The features of a layer, of which SHAPES[0] has the heads."""
LATENCY = 1e-6
"""Assumed seconds from a request of a loaded memory system to its answer: by Little's law 23 to 32 KB in flight keep a
multiprocessor of an H100 or H200 at its share of the copy bandwidth."""
# Of a multiprocessor of compute capability 9.0. A program reserves 1 KiB of shared memory beside its own.
REGISTERS, WARPS, PROGRAMS, SHARED, RESERVED, SCHEDULERS = 65536, 64, 32, 233_472, 1024, 4


class Gpu(NamedTuple):
    name: str
    copy: float  # bytes per second, read and written
    clock: float = 1.98e9
    processors: int = 132

    @property
    def slots_per_unit(self) -> float:
        """Instructions that a multiprocessor can issue while its share of the copy bandwidth moves 512 bytes."""
        return sass.UNIT * self.processors / self.copy * self.clock * SCHEDULERS


GPUS = (Gpu("H100", 3.0e12), Gpu("H200", 4.24e12))
"""The bandwidth of the H200 is what a copy was measured at (bench/results/nvidia-h200), that of the H100 is assumed."""


class Launch(NamedTuple):
    """What the model knows of a launch. `moved`: bytes of tokens, which map_backward does not touch."""

    moved: int
    programs: int
    resident: int  # programs that a multiprocessor holds
    iterations: float  # of the loop over tokens in a program; 1 if there is none
    issued: int  # warp instructions of an iteration
    outside: int  # warp instructions of a program outside its iterations
    in_flight: int  # bytes that a program has requested at most
    ahead: int  # iterations that are loaded while one is computed

    @property
    def per_unit(self) -> float:
        """Warp instructions of the loop over tokens for each 512 bytes of tokens."""
        return self.issued * self.iterations * self.programs / max(1, self.moved // sass.UNIT)

    def waves(self, gpu: Gpu) -> float:
        return self.programs / (self.resident * gpu.processors)


class Prediction(NamedTuple):
    seconds: float
    of_copy: float  # the time that a copy of as many bytes takes, over `seconds`
    binds: str


def trips(constants: dict[str, Any]) -> int:
    """How often the loops inside the loop over tokens are taken: they are over features, some at a time."""
    features = max(constants.get(name, 1) for name in ("D", "I", "C"))
    return ceil(features / min(features, *(constants.get(name) or features for name in ("BLOCK_K", "BLOCK_O"))))


def look_at(recorded: Recorded, shape: OpShape, itemsize: int) -> Launch:
    code, registers = sass.of_cubin(recorded.cubin)
    constants, warps = recorded.constants, recorded.warps
    tokens, (tiles_of_tokens, computing) = recorded.tokens, recorded.tiles
    programs = recorded.programs // tiles_of_tokens * computing
    moved = tokens * shape.B * shape.H * shape.N * shape.D * itemsize
    whole = range(len(code.instructions))
    iterations = shape.B * shape.H * shape.N * tiles_of_tokens / recorded.programs / constants.get("BLOCK_N", shape.N)
    over_tokens = code.over_tokens if tokens and iterations > 1 else ()
    bodies = over_tokens or (whole,)
    # the two loops of a forward in one launch move as many bytes, and may do so in tiles of different sizes
    tiles = [code.units(r) / code.units(bodies[0]) if over_tokens else 1 for r in bodies]
    body = round(sum(code.executed(r, trips(constants)) / tile for r, tile in zip(bodies, tiles, strict=True)))
    units, loaded = sum(map(code.units, bodies)), sum(map(code.loaded, bodies))
    iterations = iterations if over_tokens else 1
    ahead = max(map(code.ahead, over_tokens), default=0)
    requested = moved / programs / iterations * loaded / units if units else 0
    of_warp = ceil(registers * 32 / 256) * 256
    return Launch(
        moved,
        programs,
        min(REGISTERS // of_warp // warps, WARPS // warps, PROGRAMS, SHARED // (recorded.shared + RESERVED)),
        iterations,
        body * warps,
        (len(whole) - sum(map(len, bodies))) * warps,
        round(requested * (ahead + 1) / len(bodies)),
        ahead,
    )


def predict(launch: Launch, gpu: Gpu) -> Prediction:
    """The longest of three times: bytes at the copy bandwidth, instructions at one per scheduler and clock, and loads
    that are waited for. All is taken as many times as there are waves, the last one whole; each wave begins with two
    loads that nothing overlaps."""
    waves = launch.waves(gpu)
    resident = min(launch.resident, max(1, launch.programs / gpu.processors))
    rate = SCHEDULERS * gpu.clock
    work = launch.programs / gpu.processors  # programs of a multiprocessor
    issue = work * (launch.iterations * launch.issued + launch.outside) / rate
    waiting = work * launch.iterations * (LATENCY + launch.issued / rate) / (resident * (launch.ahead + 1))
    times = {"memory": launch.moved / gpu.copy, "issue": issue, "latency": waiting}
    binds = max(times, key=times.__getitem__)
    whole = ceil(waves) / waves if waves > 1 else 1
    begin = 2 * LATENCY * (ceil(waves) if launch.iterations > 1 else 1)
    seconds = times[binds] * whole + begin
    if whole > 1.2:
        binds += ", waves"
    return Prediction(seconds, launch.moved / gpu.copy / seconds, binds)


HEADINGS = (
    "kernel", "dtype", "D", "(B,N,H,D)", "MB", "instr/512 B", "warps", "programs", "per SM", "waves", "KB in flight/SM",
    "ahead", *(f"{gpu.name}: {what}" for gpu in GPUS for what in ("binds", "us", "of copy")),
)  # fmt: skip


def rows() -> Iterator[tuple[str, ...]]:
    """The cells of the table."""
    for dtype in gpu_launches.DTYPES:
        for shape in SHAPES:
            tensors = gpu_launches.inputs(shape, dtype, "cpu", values=False)
            for direction, recorded in gpu_launches.of_call(tensors):
                launch = look_at(recorded, shape, dtype.itemsize)
                yield _cells(f"{name_of(recorded)}, {direction}", dtype, shape, recorded, launch)
        for direction, recorded in gpu_launches.of_layer(LAYER, SHAPES[0].H, dtype):
            launch = look_at(recorded, LAYER, dtype.itemsize)
            yield _cells(f"{name_of(recorded)}, {direction}", dtype, LAYER, recorded, launch)


def name_of(recorded: Recorded) -> str:
    return recorded.name.removesuffix("_kernel")


def _cells(name: str, dtype: torch.dtype, shape: OpShape, recorded: Recorded, launch: Launch) -> tuple[str, ...]:
    cells = [
        name, str(dtype).removeprefix("torch."), f"{shape.D}", f"{shape}", f"{launch.moved / 1e6:.0f}",
        f"{launch.per_unit:.0f}" if launch.moved else "", f"{recorded.warps}", f"{launch.programs}",
        f"{launch.resident}",
        f"{launch.waves(GPUS[0]):.2f}", f"{launch.in_flight * launch.resident / 1024:.0f}" if launch.moved else "",
        f"{launch.ahead}" if launch.moved else "",
    ]  # fmt: skip
    for gpu in GPUS:
        seconds, of_copy, binds = predict(launch, gpu)
        cells += [binds, f"{seconds * 1e6:.0f}", f"{of_copy:.2f}" if launch.moved else ""]
    return tuple(cells)


CUDA_HEADINGS = ("kernel", "instr/512 B, at least", "ahead", "instructions")


def cuda_rows(module: Path, arch: str = "sm_90a") -> Iterator[tuple[str, ...]]:
    """The kernels of the module _cuda that have products in a loop over tokens. Their launches are known on a GPU
    alone, so there are no times. Loops inside that loop are counted once: the numbers are lower bounds."""
    sys.path.insert(0, str(ROOT / "tests" / "cuda_kernels"))
    import machine_code  # type: ignore[import-not-found]

    text = sass.output(machine_code.tool(), "-sass", "-arch", arch, module)
    found: dict[tuple[Any, ...], tuple[str, ...]] = {}
    for symbol, code in sass.read(text).items():
        loops = [r for r in code.over_tokens if code.units(r) >= 1]
        if not loops or not machine_code.NAME.match(symbol):
            continue
        kernel = machine_code.Kernel(symbol, arch)
        if kernel.dtype not in ("f32", "bf16") or not kernel.product:
            continue
        loop = max(loops, key=code.units)
        # of the instances of a name, the one of fewest instructions
        key = (kernel.kind, kernel.dtype, kernel.product, kernel.width, kernel.outputs, kernel.adds)
        per_unit = code.executed(loop, 1) / code.units(loop)
        name = str(kernel).removesuffix(f" of {arch}")
        cells = (name, f"{per_unit:.0f}", f"{code.ahead(loop)}", f"{len(code.instructions)}")
        if key not in found or float(found[key][1]) > per_unit:
            found[key] = cells
    yield from (found[key] for key in sorted(found, key=str))


def table(headings: tuple[str, ...], lines: list[tuple[str, ...]], words: int) -> list[str]:
    rules = ["---"] * words + ["---:"] * (len(headings) - words)
    return [f"| {' | '.join(cells)} |" for cells in (headings, tuple(rules), *lines)]


def render() -> str:
    slots = ", ".join(f"{gpu.name} {gpu.slots_per_unit:.0f}" for gpu in GPUS)
    text = [
        BEGIN,
        f"Compiled by Triton {triton.__version__} for sm_90. Issue slots for 512 bytes of a multiprocessor: {slots}.",
        "",
        *table(HEADINGS, list(rows()), 4),
    ]
    modules = sorted((ROOT / "xformer_kernels").glob("_cuda*.so"), key=lambda path: path.stat().st_mtime)
    if modules:
        text += [
            "",
            "The CUDA kernels of sm_90a that have a loop over tokens. Those of fragments load the next tokens into",
            "registers, which *ahead* does not count.",
            "",
        ]
        text += table(CUDA_HEADINGS, list(cuda_rows(modules[-1])), 1)
    return "\n".join([*text, END])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_model", description=__doc__)
    parser.add_argument("--write", type=Path, help="the page whose table is replaced; by default it is printed")
    options = parser.parse_args(arguments)
    from bench import host  # which turns Triton's interpreter off

    host.install()
    text = render()
    if options.write is None:
        print(text)
        return
    page = options.write.read_text()
    replaced, count = re.subn(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: text, page, flags=re.S)
    if count != 1:
        parser.error(f"--write {options.write}: the page has no line {BEGIN!r}")
    options.write.write_text(replaced)


if __name__ == "__main__":
    main()
