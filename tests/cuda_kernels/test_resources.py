"""Every kernel of the module _cuda as it was built, for all its architectures; no GPU is needed. See machine_code.py.

What must hold: nothing spills and no array of a thread lies in memory, the blocks that a multiprocessor is to hold fit,
products of 16 bits use tensor cores. In one launch, tokens come by asynchronous copies of 16 bytes and results leave by
stores of 16 bytes. The kernels of two passes have so few instructions in their main loops that memory decides how long
they take. The table of all that is left in build/cuda/resources.csv.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import machine_code
import pytest

ROOT = Path(__file__).parents[2]
LOG = ROOT / "build" / "cuda" / "ptxas.log"
TABLE = LOG.with_name("resources.csv")
REQUIRED = os.environ.get("XFORMER_KERNELS_CUDA", "0").lower() not in ("", "0", "false", "no", "off")
# For 512 bytes in the main loop of two passes, which an H200 moves in 126 issue slots of a multiprocessor: by kernel
# and how many results it has.
MOST_INSTRUCTIONS = {
    ("fragment_gram_kernel", 1): {"bf16": 26, "f16": 26, "f32": 52},
    ("fragment_mix_kernel", 1): {"bf16": 25, "f16": 29, "f32": 50},
    ("fragment_mix_kernel", 3): {"bf16": 34, "f16": 38, "f32": 40},
}
REGISTERS = 65_536  # of a multiprocessor; a warp's come in portions of 256


class Kind(NamedTuple):
    threads: int
    blocks: int  # that fit on a multiprocessor by their registers
    copies: bool = False  # tokens into shared memory
    stores: bool = False  # tokens


KINDS = {
    "fragment_gram_kernel": Kind(128, 2),
    "fragment_mix_kernel": Kind(128, 2),
    "fused_forward_kernel": Kind(256, 1, copies=True, stores=True),
    "fused_backward_kernel": Kind(256, 1, copies=True, stores=True),
    "map_forward_kernel": Kind(256, 2),
    "map_backward_kernel": Kind(256, 2),
    "clear_kernel": Kind(256, 2),
    "temperature_kernel": Kind(256, 2),
}


@pytest.fixture(scope="module")
def module():
    modules = list((ROOT / "xformer_kernels").glob("_cuda*.so"))
    if modules and LOG.exists():
        return max(modules, key=lambda path: path.stat().st_mtime)
    note = ROOT / "xformer_kernels" / "_no_cuda.txt"
    cause = note.read_text().strip() if note.exists() else f"there is no {'ptxas.log' if modules else 'module'}"
    return (pytest.fail if REQUIRED else pytest.skip)(f"_cuda was not built here: {cause}")


@pytest.fixture
def kernels(module):
    return machine_code.kernels(LOG)


def write_table(kernels):
    rows = [
        {
            "kernel": kernel.kind.removesuffix("_kernel"),
            "dtype": kernel.dtype,
            "product": kernel.product,
            "width": kernel.width or "",
            "results": kernel.outputs,
            "terms added": kernel.adds,
            "arch": kernel.arch,
            **kernel.numbers,
            "blocks by registers": blocks_by_registers(kernel),
            "tensor core": " ".join(kernel.having(machine_code.TENSOR_CORE)),
            "copies": " ".join(kernel.having("LDGSTS")),
            "stores": " ".join(kernel.having("STG")),
            "matrix loads": " ".join(kernel.having("LDSM")),
            "instructions of 512 bytes": f"{kernel.loop_instructions:.1f}" if kernel.loop else "",
        }
        for kernel in kernels
    ]
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), restval=0)
        writer.writeheader()
        writer.writerows(rows)


def blocks_by_registers(kernel):
    of_warp = -(-kernel.numbers["registers"] * 32 // 256) * 256
    return REGISTERS // of_warp // (KINDS[kernel.kind].threads // 32) if kernel.kind in KINDS else 0


def test_every_kind_is_known(kernels):
    assert {kernel.kind for kernel in kernels} <= set(KINDS)


def test_every_kernel_is_there_for_every_architecture(kernels):
    archs = {kernel.arch for kernel in kernels}
    found = {(kernel.symbol, kernel.arch) for kernel in kernels}
    assert not {(symbol, arch) for symbol, _ in found for arch in archs} - found
    incomplete = [str(kernel) for kernel in kernels if "registers" not in kernel.numbers]
    assert not incomplete


def test_nothing_spills(kernels):
    faults = [
        f"{kernel}: {kernel.numbers[what]} bytes of {what} ({kernel.numbers['registers']} registers)"
        for kernel in kernels
        for what in ("spill stores", "spill loads", "stack")
        if kernel.numbers.get(what)
    ]
    assert not faults, "\n".join(faults)


def test_blocks_fit(kernels):
    """By registers; all shared memory is asked for at launch: see test_shared_memory_fits."""
    faults = [
        f"{kernel}: {blocks_by_registers(kernel)} blocks fit, with {kernel.numbers['registers']} registers a thread"
        for kernel in kernels
        if blocks_by_registers(kernel) < KINDS[kernel.kind].blocks
    ]
    faults += [f"{kernel}: static shared memory" for kernel in kernels if kernel.numbers.get("shared", 0)]
    assert not faults, "\n".join(faults)


def test_instructions(kernels, module):
    """One test: to disassemble takes longer than all others."""
    cuobjdump = machine_code.tool()
    if cuobjdump:
        machine_code.disassemble(kernels, module, cuobjdump, TABLE.with_name("instructions.json"))
    write_table(kernels)
    if not cuobjdump:
        pytest.skip("there is no cuobjdump on PATH, in the CUDA toolkit or in Triton's wheel")
    faults = [f"{kernel}: {fault}" for kernel in kernels for fault in faults_of(kernel)]
    assert not faults, "\n".join(faults)


def faults_of(kernel):
    kind = KINDS[kernel.kind]
    tensor_core = kernel.having(machine_code.TENSOR_CORE)
    if kernel.product in ("tensor core", "fragments") and not tensor_core:
        yield "no tensor core"
    if kernel.product == "fma" and tensor_core:
        yield f"{tensor_core}, which round otherwise"
    if kernel.product == "tensor core" and not kernel.having(r"LDSM"):
        yield "operands of tensor cores are not loaded as matrices"
    if kind.copies and not kernel.having(r"LDGSTS\..*128"):
        yield f"no asynchronous copies of 16 bytes: {kernel.having('LDGSTS')}"
    if kind.stores and not kernel.having(r"STG\..*128"):
        yield f"no stores of 16 bytes: {kernel.having('STG')}"
    if kernel.product == "fragments" and not kernel.loop:
        yield "no loop over tokens"
    elif kernel.product == "fragments" and (
        kernel.loop_instructions > MOST_INSTRUCTIONS[kernel.kind, kernel.outputs][kernel.dtype]
    ):
        yield f"{kernel.loop_instructions:.1f} instructions for 512 bytes"
    # the memory of other blocks of a cluster, which fused kernels have from sm_90 on, has no other addresses
    cluster = kernel.kind.startswith("fused") and int(re.sub(r"\D", "", kernel.arch)) >= 90
    generic = [name for name in kernel.having(r"(LD|ST)(\.|$)") if not name.endswith(".U8")]  # but for masks
    if generic and not cluster:
        yield f"generic addresses: {generic}"


TWO_PASSES = """
import sys
sys.path.insert(0, sys.argv[1])
import emulated
emulated.load(emulated.Path(sys.argv[2]))
import torch
import xformer_kernels as xk
from xformer_kernels.backends import cuda
cuda.path = "two passes"
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for D in (16, 32, 48, 64):
        x = torch.ones(1, 3, 1, D, dtype=dtype, requires_grad=True)
        xk.xfa(x, x, x, torch.ones(1), backend="cuda").sum().backward()
"""


def test_shared_memory_fits():
    """Launches of the two passes, on the device that has least; one launch is chosen only where it fits."""
    module = sys.modules.get("xformer_kernels._cuda")
    if module is None or not module.build_info()["emulated"] or os.environ.get("XFORMER_KERNELS_EMULATED_SANITIZE"):
        pytest.skip("the kernels are not emulated here, or with sanitizers")
    command = [sys.executable, "-c", TWO_PASSES, Path(__file__).parent, Path(module.__file__).parent]
    environment = {**os.environ, "XK_EMULATION_DEVICE": "8.6"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
