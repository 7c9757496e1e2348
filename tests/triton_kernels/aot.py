"""Compiles the kernels that the ops launch, for GPUs that need not be present, and reports their resource usage.

python tests/triton_kernels/aot.py --arch sm_90 --dtype bfloat16 --features 32 [--maps query_key-token] [--out x.csv]

The launches are recorded by calling the ops on meta tensors, so that exactly the kernels that the ops launch are
compiled. This needs neither a GPU nor a driver; TRITON_INTERPRET must not be set. There is one row per kernel:
registers, stack (spills), shared memory, and counts of load, store and tensor core instructions.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench import gpu_launches, gpu_model, sass
from xformer_kernels.backends.triton import configs, launch, linear, maps, ops
from xformer_kernels.backends.triton.workarounds import compiling
from xformer_kernels.reference import accumulate_dtype
from xformer_kernels.spec import Spec

MAPS = tuple(f"{map}-{norm}" for map in ("query_key", "key_value") for norm in ("token", "feature", "none"))
LAYER = "layer-gram"
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}
TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.bool: "*i1",
    torch.int64: "*i64",
}
TENSOR_CORE = re.compile(r"HMMA|HGMMA|UTC\w*MMA|DMMA|v_mfma")
INSTRUCTION = re.compile(
    r"\b((?:HMMA|HGMMA|UTC\w*MMA|DMMA|LDGSTS|LDG|STG|LDL|STL)[.\w]*|v_mfma_\w+|(?:global|buffer)_load_\w+)\b"
)


class Launch(NamedTuple):
    kernel: Any
    config: configs.Config
    args: tuple[Any, ...]
    constants: dict[str, Any]


class Job(NamedTuple):
    arch: str
    dtype: torch.dtype
    features: int
    map: str
    masked: bool = False
    tf32: bool = False


@contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Context in which ops on meta tensors record their launches instead of running them, as if on `arch`."""
    recorded: list[Launch] = []
    saved = ops._run, ops._slots, launch.target

    def run(kernel: Any, grid: int, config: configs.Config, *args: Any, **constants: Any) -> None:
        recorded.append(Launch(kernel, config, args, constants))

    ops._run, ops._slots = run, lambda *_, **__: 2 * PROCESSORS[arch]
    launch.target = lambda device: launch.Target(arch, PROCESSORS[arch])
    try:
        yield recorded
    finally:
        ops._run, ops._slots, launch.target = saved


def launches(job: Job) -> dict[str, Launch]:
    """The launches by name: xfa with the forward in one launch and in two, the primitives and linear attention; or the
    passes of a layer in Gram form, which has no map."""
    if job.map == LAYER:
        return of_layer(job)
    D, dtype = job.features, job.dtype
    map, norm = job.map.split("-")
    spec = Spec(map, norm)
    found: dict[str, Launch] = {}
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, job.tf32
    with recording(job.arch) as recorded:
        for B in (1, 512):
            q, k, v = torch.empty(B, 4096, 3, 4, D, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4).unbind(0)
            temperature = torch.empty(4, device="meta")
            mask = torch.empty(B, 4096, dtype=torch.bool, device="meta") if job.masked else None
            out, stats = ops.xfa_forward(q, k, v, temperature, mask, spec)
            if B == 1:
                ops.xfa_backward(out, q, k, v, temperature, stats, mask, spec)
        names = ("gram", "apply", "gram of dout", "map_backward", "gradients", "forward")
        found.update(zip(names, recorded, strict=len(recorded) == len(names)))
        if len(recorded) > len(names):
            # a map that one program cannot hold takes two launches for any batch size
            found.pop("forward")
        if map == "query_key" and norm == "token":
            recorded.clear()
            weight, vector = (torch.empty(1, 4, *size, dtype=dtype, device="meta") for size in ((D, D), (D,)))
            ops.channel_mix(v, weight, vector, v, vector, q, weight)
            ops.channel_mix(v, weight.float(), None, None, None, None, None)
            ops.gram(v, v, True, mask)
            found.update(zip(("channel_mix", "channel_mix, wide", "gram, symmetric"), recorded, strict=True))
            recorded.clear()
            ops.xfa_forward(*(x[:1] for x in (q, k, v)), temperature, None, Spec(map, "feature"))
            found["gram, normalised"] = recorded[0]
            if linear.takes_linear_attention(dtype, (D, D)):
                found.update(of_linear_attention(q, k, v, mask, recorded))
    matmul.allow_tf32 = before
    return found


def of_linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, recorded: list[Launch]
) -> dict[str, Launch]:
    """Linear attention with both softmaxes and a denominator, which uses all of its kernels."""
    recorded.clear()
    spec = Spec.of_linear_attention("softmax_tokens", True, 1.0, 1e-6)
    out, stats = linear.linear_attention_forward(q, k, v, mask, mask, spec)
    linear.linear_attention_backward(out.transpose(1, 2), q, k, v, stats, mask, mask, spec)
    return dict(zip(configs.LINEAR_KERNELS, recorded, strict=True))


def of_layer(job: Job) -> dict[str, Launch]:
    """The kernels of a half block, forward and backward, with the widest heads; and the maps of key_value."""
    B, N, C = 8, 4096, job.features
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, job.tf32
    x = torch.empty(B, N, C, dtype=job.dtype, device="meta")
    mask = torch.empty(B, N, dtype=torch.bool, device="meta") if job.masked else None
    wide = accumulate_dtype(x.dtype)
    heads = next(H for H in range(1, C + 1) if C % H == 0 and maps.takes_layer_maps(wide, C // H))
    found: dict[str, Launch] = {}
    for map in ("query_key", "key_value"):
        with recording(job.arch) as recorded:
            for calls in gpu_launches.calls_of_layer(x, heads, mask, map).values():
                for call in calls:
                    call()
        for launched in recorded:
            name = launched.kernel.__name__.removesuffix("_kernel")
            if name in configs.MAPS_KERNELS:
                found[name if map == "query_key" else f"{name}, {map}"] = launched
            elif map == "query_key":
                found[f"{name}, backward" if name in found else name] = launched
    matmul.allow_tf32 = before
    return found


def target(arch: str) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def signature(launched: Launch) -> dict[str, str]:
    """Argument types as in the JIT signature. All integers are i64; see compiler.kernel."""
    names = [parameter.name for parameter in launched.kernel.params]

    def type_of(argument: Any) -> str:
        if isinstance(argument, torch.Tensor):
            return TYPES[argument.dtype]
        return "i64"

    types = {name: type_of(argument) for name, argument in zip(names, launched.args, strict=False)}
    return {**types, **dict.fromkeys(launched.constants, "constexpr")}


def compile_one(job: Job, name: str, launched: Launch) -> dict[str, Any]:
    """A row of the table. Errors of the compiler are raised."""
    config = launched.config
    source = ASTSource(launched.kernel, signature(launched), launched.constants)
    with compiling(job.arch, launched.args, launched.constants):
        compiled = triton.compile(source, target=target(job.arch), options=config.options())
    row = {
        "arch": job.arch,
        "dtype": str(job.dtype).removeprefix("torch.") + (" tf32" if job.tf32 else ""),
        "features": job.features,
        "map": job.map,
        "masked": job.masked,
        "kernel": name,
        **config._asdict(),
        "shared": compiled.metadata.shared,
    }
    if "cubin" in compiled.asm:
        numbers, code = sass.usage(compiled.asm["cubin"]), sass.listing(compiled.asm["cubin"])
        (kernel,) = sass.read(code).values()
        resources = launch.Target(job.arch, PROCESSORS[job.arch])
        row |= {
            "registers": numbers["REG"],
            "spilled": numbers["STACK"] + numbers["LOCAL"],
            "resident": launch.resident(resources, config.warps, numbers["REG"], row["shared"]),
            "overwritten": kernel.overwritten(),
            "loops": [
                {
                    "instructions": kernel.executed(where, gpu_model.trips(launched.constants)),
                    "vectors": kernel.units(where),
                    "products": kernel.products(where),
                    "outstanding": kernel.outstanding(where),
                }
                for where in kernel.loops
            ],
        }
    else:
        code = compiled.asm["amdgcn"]
        row |= {
            "registers": int(re.search(r"\.vgpr_count: *(\d+)", code)[1]),
            "spilled": int(re.search(r"\.private_segment_fixed_size: *(\d+)", code)[1]),
        }
    counts = Counter(re.sub(r"\.EL?\b|\.BYPASS|\.64x\w+", "", found) for found in INSTRUCTION.findall(code))
    row["tensor_core"] = sum(count for found, count in counts.items() if TENSOR_CORE.match(found))
    row["instructions"] = dict(sorted(counts.items()))
    return row


def rows_of(job: Job, kernels: str = "") -> list[dict[str, Any]]:
    """The rows of a job. A kernel that does not compile has a row with its error. `kernels`: only these, if any."""
    rows = []
    for name, launched in launches(job).items():
        if kernels and name not in kernels.split(","):
            continue
        try:
            rows.append(compile_one(job, name, launched))
        except Exception as error:  # report any error of the compiler
            rows.append({**job._asdict(), "dtype": str(job.dtype), "kernel": name, "error": repr(error)[:400]})
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", default=",".join(configs.ARCHITECTURES))
    parser.add_argument("--dtype", default="float32,bfloat16,float16")
    parser.add_argument("--features", default="16,32,64,128,256")
    parser.add_argument("--maps", default=",".join(MAPS))
    parser.add_argument("--kernels", default="", help="names in the table; all by default")
    parser.add_argument("--masked", action="store_true")
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    parser.add_argument("--out", type=Path, help="also write CSV")
    options = parser.parse_args(arguments)
    jobs = [
        Job(arch, getattr(torch, dtype), int(features), map, options.masked, options.tf32)
        for arch in options.arch.split(",")
        for dtype in options.dtype.split(",")
        for features in options.features.split(",")
        for map in options.maps.split(",")
    ]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for found in pool.map(rows_of, jobs, [options.kernels] * len(jobs)):
            rows += found
            for row in found:
                print(json.dumps(row) if options.json else "  ".join(map(str, row.values())), flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, sorted({key for row in rows for key in row}, key=list(rows[0]).index))
            writer.writeheader()
            writer.writerows(rows)
    return any("error" in row for row in rows)


if __name__ == "__main__":
    sys.exit(main())
