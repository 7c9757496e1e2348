"""Every kernel with every shipped config, compiled for GPUs that need not be present; see aot.py.

Each kernel must compile, its shared memory must fit, and no registers may spill. 16-bit and tf32 products must use
tensor cores, and on NVIDIA contiguous tokens must be loaded with 128-bit loads. Registers must not be overwritten while
an asynchronous product reads them (see workarounds.py). On sm_90 with up to 64 features, loads must overlap with
products, with few instructions and enough bytes in flight to hide the memory latency. The table of registers, shared
memory and spills is written to build/triton. Thorough tests compile everything; tests on a push compile the rows of 32,
64 and 128 features for one architecture, and the row of 128 features for another one and the oldest.
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
configs = pytest.importorskip("xformer_kernels.backends.triton.configs", reason="triton is not installed")

HERE = Path(__file__).parent
ARTEFACTS = HERE.parent.parent / "build" / "triton"
# maximum bytes of shared memory per program
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376, "gfx942": 65_536}
EVERY_ROW = ("--features", "16,32,64,128,256" if THOROUGH else "32,64,128", "--maps", "query_key-token")
ONE_ROW = EVERY_ROW if THOROUGH else ("--features", "128", "--maps", "query_key-token")
OTHERS = (
    "--maps",
    "query_key-feature,query_key-none,key_value-token,key_value-feature,key_value-none",
    "--masked",
)
CASES = {
    # the table has rows for 2-byte and 4-byte elements; the 16-bit dtypes share theirs
    **{arch: (arch, "bfloat16,float32", EVERY_ROW if arch == "sm_90" else ONE_ROW) for arch in SHARED},
    "sm_90-48": (
        "sm_90",
        "bfloat16,float32",
        ("--features", "48", "--maps", "query_key-token", "--kernels", "gram,gram of dout,apply,gradients"),
    ),
    "sm_90-float16": ("sm_90", "float16", ONE_ROW),
    "sm_90-tf32": ("sm_90", "float32", (*ONE_ROW, "--tf32")),
    "sm_90-others": ("sm_90", "bfloat16", ("--features", "24,64,256" if THOROUGH else "24", *OTHERS)),
    "sm_90-float64": ("sm_90", "float64", ONE_ROW),
    "sm_90-float64-masked": ("sm_90", "float64", ("--features", "16", "--maps", "query_key-token", "--masked")),
}
# the passes of a layer in Gram form
LAYER = ("--maps", "layer-gram")
for arch in SHARED:
    CASES[f"{arch}-layer"] = (
        (arch, "bfloat16,float32", (*EVERY_ROW[:1], "16,32,64,128,256", *LAYER))
        if THOROUGH
        else (arch, "bfloat16", ("--features", "256", *LAYER))
    )
CASES["sm_90-layer-float16"] = ("sm_90", "float16", ("--features", "64,256", *LAYER, "--masked"))
CASES["sm_90-layer-float64"] = ("sm_90", "float64", ("--features", "24,256", *LAYER, "--masked"))
CASES["sm_90-layer-tf32"] = ("sm_90", "float32", ("--features", "64,256", *LAYER, "--tf32"))
CASES["sm_90-layer-odd"] = ("sm_90", "bfloat16,float32", ("--features", "31,48,200", *LAYER))
if not THOROUGH:  # each of these takes a minute of CPU time to compile
    for name in ("sm_100", "sm_120", "sm_90-float16", "sm_90-float64", "sm_100-layer", "sm_120-layer"):
        del CASES[name]
# reads only D x D elements, which do not need 128-bit loads
NARROW = ("map_backward",)
NO_PRODUCT = (*NARROW, "linear_maxima", "layer_sample", "layer_statistics", "layer_statistics, backward")


SYMMETRIC = ("gram, symmetric", "layer_gram")
# kernels with a loop over tokens, and the numbers of tensors that it reads, and reads or writes
LOOPS = {"gram": (2, 2), "gram of dout": (2, 2), "apply": (1, 2), "gradients": (3, 6)}
MOST_INSTRUCTIONS = {"bfloat16": 40, "float32": 90}
"""Maximum instructions for 512 bytes of tokens that the loop reads or writes."""
MORE_INSTRUCTIONS = {("gram", "bfloat16", 48): 47}
"""Sums of squares of a tile of 64 features, a quarter of which is empty."""
IN_FLIGHT = 32 << 10
"""Minimum bytes in flight per multiprocessor, by Little's law on an H100 or H200."""


def faults_of_loop(row):
    """Faults of the loop over tokens, which is the loop with the most products."""
    loop = max(row["loops"], key=lambda loop: loop["products"])
    faults = []
    # a loop that is not pipelined requests a whole tile, and other programs compute meanwhile
    pipelined = row["stages"] > 1
    if pipelined and min(loop["outstanding"], default=0) < 1:
        faults.append(f"waits for all loads: {loop}")
    size = 4 if row["dtype"] == "float32" else 2
    third = row["kernel"] == "gram" and row["map"] == "key_value-token"  # q, for its norms
    read, moved = ((n + third) * row["block_n"] * row["features"] * size for n in LOOPS[row["kernel"]])
    in_flight = max(1, row["stages"] - 1) * read * row["resident"]
    feature_norm = row["map"].endswith("feature")  # its Gram pass is bound by products; others also compute norms
    if in_flight < IN_FLIGHT and not (feature_norm and row["kernel"].startswith("gram")):
        faults.append(f"{in_flight} bytes in flight: {row['resident']} programs of {row['registers']} registers")
    per_512 = loop["instructions"] * row["warps"] * 512 / moved
    most = MORE_INSTRUCTIONS.get((row["kernel"], row["dtype"], row["features"]), MOST_INSTRUCTIONS[row["dtype"]])
    if row["features"] >= 32 and not feature_norm and per_512 > most:
        faults.append(f"{per_512:.0f} instructions for 512 bytes: {loop}")
    return faults


def compiled(name, arch, dtypes, arguments):
    """Rows of the table. The compiler must not see TRITON_INTERPRET, which the tests set."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, HERE / "aot.py", "--arch", arch, "--dtype", dtypes, *arguments, "--json", "--jobs", "1"]
    command += ["--out", ARTEFACTS / f"{name}.csv"]
    done = subprocess.run([str(x) for x in command], env=environment, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows, done.stderr[-3000:]
    return rows


@pytest.mark.parametrize(
    "name",
    [name if name in ("sm_90", "sm_90-layer") else pytest.param(name, marks=pytest.mark.nightly) for name in CASES],
)
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
        faults += [f"{what}: overwritten while read: {fault}" for fault in row.get("overwritten", ())]
        if arch == "sm_90" and row["dtype"] in MOST_INSTRUCTIONS and row["features"] <= 64 and row["kernel"] in LOOPS:
            faults += [f"{what}: {fault}" for fault in faults_of_loop(row)]
        if row["kernel"].startswith("layer") and row["stages"] > 1 and arch != "sm_100":
            waits = [min(loop["outstanding"]) for loop in row.get("loops", ()) if loop["outstanding"]]
            faults += [f"{what}: waits for all loads"] * (0 in waits)
        multiplies = row["kernel"] not in NO_PRODUCT and not row["kernel"].startswith(
            configs.MAPS_KERNELS
        )  # of float32
        cut = "tf32" in row["dtype"] and row["kernel"] not in SYMMETRIC  # norms are computed from that
        in_parts = arch.startswith("sm_") and row["features"] in (48, 64) and row["kernel"] in LOOPS
        if multiplies and not row["tensor_core"] and (not row["dtype"].startswith("float32") or cut or in_parts):
            faults.append(f"{what}: no tensor core")
        aligned = row["features"] * (2 if "float16" in row["dtype"] else 4) % 16 == 0
        if (
            row["kernel"] not in NARROW
            and aligned
            and arch.startswith("sm_")
            and not any("128" in found for found in row["instructions"])
        ):
            faults.append(f"{what}: no load of 128 bits: {row['instructions']}")
    assert not faults, "\n".join(faults)
