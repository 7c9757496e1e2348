"""Reads and copies of pieces of tokens on a GPU: ``python -m bench.gpu_memory [--out bench/results]``.

A row of memory holds q, k and v of all heads, and q alone is read: 8 pieces of as many bytes as a head has, at a
stride of 24 pieces. Programs take one head each, as the kernels do, or whole rows of q. `of copy` is the bandwidth over
that of a large copy by torch in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench import gpu_launches, machine, report
from bench.terminal import Line, Terminal

PIECES = (64, 96, 128, 192, 512)
"""Bytes of a head: 32 and 48 features of 16 bits and of 32, and a whole access of a warp."""
HEADS, TENSORS = 8, 3
READ = 1 << 28
TILE = 1 << 14
"""Bytes of a program's tile: with 128 threads, eight loads of 16 bytes are under way in each."""
PROGRAMS = 8
"""Of each multiprocessor."""


@triton.jit
def pieces_kernel(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, tokens, chunk, row, groups,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """Reads columns [group WIDTH, (group + 1) WIDTH) of a chunk of the rows of x; COPY: into out, else their sums."""
    group = tl.program_id(0) % groups
    begin = (tl.program_id(0) // groups).to(tl.int64) * chunk
    columns = tl.arange(0, BLOCK)
    inside = (columns < WIDTH)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK), tl.int32)
    for start in range(0, chunk, BLOCK_N):
        rows = begin + start + tl.arange(0, BLOCK_N)
        mask = inside & (rows < tokens)[:, None]
        x = tl.load(x_ptr + group * WIDTH + (rows * row)[:, None] + columns[None, :], mask=mask, other=0)
        if COPY:
            places = (rows * (groups * WIDTH))[:, None] + columns[None, :]
            tl.store(out_ptr + group * WIDTH + places, x, mask=mask)
        else:
            total += x
    if not COPY:
        tl.store(out_ptr + tl.program_id(0), tl.sum(total))


@dataclass(frozen=True)
class Row:
    """Reads, or reads and writes, of pieces of `piece` bytes."""

    piece: int
    access: str  # "read" or "copy"
    program: str  # "a head" or "whole rows"
    programs: int
    ms: float
    spread: float
    gb_per_s: float
    of_copy: float


def copy_bandwidth(device: str, on_gpu: bool) -> float:
    """Bytes per second, read and written, of a large copy."""
    size = 4 * READ if on_gpu else 1 << 20
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / gpu_launches.seconds(lambda: target.copy_(source), on_gpu)[0]


def measure(processors: int, copy: float, device: str, on_gpu: bool, checked: bool) -> Iterator[Row]:
    """`checked`: on a GPU or in Triton's interpreter, where there are results."""
    for piece in PIECES:
        width = piece // 4
        tokens = READ // (HEADS * piece)
        x = torch.empty(tokens, TENSORS * HEADS * width, dtype=torch.int32, device=device)
        if checked:
            x.random_(0, 256)  # so that no sum overflows
        for program, groups in (("a head", HEADS), ("whole rows", 1)):
            columns = HEADS * width // groups
            block = triton.next_power_of_2(columns)
            block_n = max(1, TILE // 4 // block)
            parts = PROGRAMS * processors // groups
            chunk = triton.cdiv(triton.cdiv(tokens, parts), block_n) * block_n
            programs = groups * triton.cdiv(tokens, chunk)
            for access in ("read", "copy"):
                copies = access == "copy"
                out = torch.empty(tokens * HEADS * width if copies else programs, dtype=torch.int32, device=device)

                def call(out: Tensor = out, copies: bool = copies, groups: int = groups, grid: int = programs,
                         x: Tensor = x, chunk: int = chunk, sizes: tuple[int, int, int] = (columns, block, block_n),
                         ) -> None:  # fmt: skip
                    pieces_kernel[(grid,)](x, out, x.shape[0], chunk, x.shape[1], groups, *sizes, copies)

                call()
                taken, spread = gpu_launches.seconds(call, on_gpu)
                if checked:
                    _check(x[:, : HEADS * width], out, copies, groups)
                rate = (2 if copies else 1) * READ / taken
                yield Row(piece, access, program, programs, taken * 1e3, spread, rate / 1e9, rate / copy)


def _check(x: Tensor, out: Tensor, copies: bool, groups: int) -> None:
    if copies:
        right = torch.equal(out.view(x.shape), x)
    else:
        right = torch.equal(out.view(-1, groups).sum(0).int(), x.view(len(x), groups, -1).sum((0, 2)).int())
    if not right:
        raise AssertionError(f"{'copies' if copies else 'sums'} of {x.shape[1] // groups * 4} bytes are wrong")


def setup(dry: bool) -> tuple[str, bool, int]:
    """Device, whether it is a GPU, and its number of multiprocessors; `dry`: the driver that launches nothing."""
    if dry:
        from bench import host  # which turns Triton's interpreter off

        host.install()
        return "cpu", False, host.PROCESSORS
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --dry compiles and launches nothing")
    return "cuda", True, torch.cuda.get_device_properties(0).multi_processor_count


def facts(device: str, copy: float) -> dict[str, Any]:
    return {**machine.facts(device), "device": device, "copy_gb_per_s": copy / 1e9}


def folder(out: Path, device: str) -> Path:
    """Of the result files; times of a dry run are no results."""
    return out / (machine.slug(device) if device == "cuda" else "dry")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="also write JSON and CSV to OUT/<machine>/")
    parser.add_argument("--dry", action="store_true", help="compile for sm_90 and launch nothing")
    options = parser.parse_args(arguments)
    device, on_gpu, processors = setup(options.dry)
    copy = copy_bandwidth(device, on_gpu)
    rows = list(measure(processors, copy, device, on_gpu, checked=on_gpu))
    terminal = Terminal()
    lines = [
        Line(
            (str(r.piece), r.access, r.program, str(r.programs), f"{r.ms:.3f}", f"{r.gb_per_s:.0f}", f"{r.of_copy:.2f}")
        )
        for r in rows
    ]
    title = f"pieces of tokens; a copy moves {copy / 1e9:.0f} GB/s" + ("" if on_gpu else "; DRY, no times of a GPU")
    terminal.table(title, ("bytes", "access", "program", "programs", "ms", "GB/s", "of copy"), 3, lines)
    if options.out:
        written = report.save(folder(options.out, device) / "memory-cuda", facts(device, copy), rows)
        terminal.print("written: " + ", ".join(map(str, written)))


if __name__ == "__main__":
    main()
