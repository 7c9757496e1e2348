"""Every kernel at every shipped configuration, compiled for GPUs that are not there; see aot.py.

What must hold: it compiles, its shared memory fits, nothing spills, products of 16 bits and of tf32 use tensor cores,
contiguous tokens are loaded by 128 bits (on NVIDIA). On sm_90, of up to 64 features, tokens are loaded while others are
multiplied, enough of them to hide the latency of memory, and with few instructions. The table of registers, shared
memory and spills is left in build/triton. If tests are thorough, everything is compiled; on a push, the rows of 32, 64
and 128 features for one architecture, and the row of 128 features for another one and the oldest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import THOROUGH

triton = pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent
ARTEFACTS = HERE.parent.parent / "build" / "triton"
# bytes of shared memory that one program may have
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376, "gfx942": 65_536}
EVERY_ROW = ("--features", "16,32,64,128,256" if THOROUGH else "32,64,128", "--maps", "query_key-token")
ONE_ROW = EVERY_ROW if THOROUGH else ("--features", "128", "--maps", "query_key-token")
OTHERS = (
    "--maps",
    "query_key-feature,query_key-none,key_value-token,key_value-feature,key_value-none",
    "--masked",
)
CASES = {
    # the table has rows for 2 and for 4 bytes, which 16-bit dtypes share
    **{arch: (arch, "bfloat16,float32", EVERY_ROW if arch == "sm_90" else ONE_ROW) for arch in SHARED},
    "sm_90-float16": ("sm_90", "float16", ONE_ROW),
    "sm_90-tf32": ("sm_90", "float32", (*ONE_ROW, "--tf32")),
    "sm_90-others": ("sm_90", "bfloat16", ("--features", "24,64,256" if THOROUGH else "24", *OTHERS)),
    "sm_90-float64": ("sm_90", "float64", ONE_ROW),
    "sm_90-float64-masked": ("sm_90", "float64", ("--features", "16", "--maps", "query_key-token", "--masked")),
}
if not THOROUGH:  # compiling takes a minute of processor time for each
    for name in ("sm_100", "sm_120", "sm_90-float16", "sm_90-float64"):
        del CASES[name]
# D x D numbers alone, which need no such width
NARROW = ("map_backward",)
NO_PRODUCT = (*NARROW, "linear_maxima")


# loops over tokens, and how many tensors each reads
LOOPS = {"gram": 2, "gram of dout": 2, "apply": 1, "gradients": 3}
# instructions for 512 bytes: of 16 bits, and of float32, whose products of 32 features take 64 of them
MOST_INSTRUCTIONS = {"bfloat16": 40, "float32": 100}
IN_FLIGHT = 32 << 10
"""Bytes per multiprocessor, by Little's law on an H100 or H200."""


def faults_of_loop(row):
    """Of the loop over tokens, which is the one with most products."""
    if row["dtype"] == "float32" and row["features"] > 32 and row["kernel"] == "gradients":
        return []  # its maps do not fit in registers, and its loops are bound by multiply-adds
    loop = max(row["loops"], key=lambda loop: loop["products"])
    faults = []
    if not loop["outstanding"] or min(loop["outstanding"]) < 1:
        faults.append(f"waits for all loads: {loop}")
    size = 4 if row["dtype"] == "float32" else 2
    tile = LOOPS[row["kernel"]] * row["block_n"] * row["features"] * size
    in_flight = (row["stages"] - 1) * tile * row["resident"]
    feature_norm = row["map"].endswith("feature")  # its Gram pass is bound by products, and others compute norms too
    if in_flight < IN_FLIGHT and not (feature_norm and row["kernel"].startswith("gram")):
        faults.append(f"{in_flight} bytes in flight: {row['resident']} programs of {row['registers']} registers")
    per_512 = loop["instructions"] / loop["vectors"]
    bounded = row["features"] == 32 or (row["features"] > 32 and size == 2 and not feature_norm)
    if bounded and per_512 > MOST_INSTRUCTIONS[row["dtype"]]:
        faults.append(f"{per_512:.0f} instructions for 512 bytes: {loop}")
    return faults


def compiled(name, arch, dtypes, arguments):
    """Rows of the table; the interpreter's variable, which the tests set, must not be seen by the compiler."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, HERE / "aot.py", "--arch", arch, "--dtype", dtypes, *arguments, "--json", "--jobs", "1"]
    command += ["--out", ARTEFACTS / f"{name}.csv"]
    done = subprocess.run([str(x) for x in command], env=environment, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows, done.stderr[-3000:]
    return rows


@pytest.mark.parametrize("name", CASES)
def test_resources(name):
    arch, dtypes, arguments = CASES[name]
    faults = []
    for row in compiled(name, arch, dtypes, arguments):
        what = f"{row['kernel']} of {row['features']} features, {row['map']}, {row['dtype']}"
        if "error" in row:
            faults.append(f"{what}: {row['error']}")
            continue
        if row["spilled"]:
            faults.append(f"{what}: spills {row['spilled']} bytes of a thread's registers ({row['registers']})")
        if row["shared"] > SHARED[arch]:
            faults.append(f"{what}: {row['shared']} bytes of shared memory")
        if arch == "sm_90" and row["dtype"] in MOST_INSTRUCTIONS and row["features"] <= 64 and row["kernel"] in LOOPS:
            faults += [f"{what}: {fault}" for fault in faults_of_loop(row)]
        multiplies = row["kernel"] not in NO_PRODUCT
        cut = "tf32" in row["dtype"] and row["kernel"] != "gram, symmetric"  # which norms come of
        if multiplies and not row["tensor_core"] and (not row["dtype"].startswith("float32") or cut):
            faults.append(f"{what}: no tensor core")
        if (
            row["kernel"] not in NARROW
            and arch.startswith("sm_")
            and not any("128" in found for found in row["instructions"])
        ):
            faults.append(f"{what}: no load of 128 bits: {row['instructions']}")
    assert not faults, "\n".join(faults)
