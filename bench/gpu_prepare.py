"""Compiles beforehand what ``bench/gpu_check.sh`` runs: ``python -m bench.gpu_prepare --out build/gpu [--cuda 90a]``.

Needs no GPU, but the Python and the Triton of the machine that has one: Triton's cache is keyed by its own files, and a
module of C++ is for one version of Python. ``make gpu-prepare`` sets these up. OUT/triton is the cache, to be named by
TRITON_CACHE_DIR; what is in it is not compiled again. OUT/_cuda*.so is the module of the CUDA kernels.
OUT/prepared.tar.xz holds both: the file to carry.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.machine import ROOT
from bench.workloads import LAYER_SHAPES, OP_SHAPES

DTYPES = ("float32", "bfloat16")
TUNED = (0, 1)
"""Shapes of the set "gpu" whose candidates are compiled, as the tuner would; they have the features of all of them."""
Group = tuple[str, str, int]


def groups() -> list[Group]:
    """What is compiled by one process each: no two of them compile the same kernels, but for the tuner's first."""
    kernels = [("kernels", dtype, i) for i in TUNED for dtype in DTYPES]
    return kernels + [("calls", dtype, 0) for dtype in DTYPES] + [("memory", "", 0)]


def compile_group(group: Group, tuner: bool) -> tuple[Group, int, int]:
    """The group, how many kernels were compiled, and how many the cache had."""
    from bench import gpu_kernels, gpu_launches, gpu_memory

    counts = gpu_launches.count_compiled()
    what, dtype, index = group
    with open(os.devnull, "w") as nowhere:
        sys.stdout = nowhere
        if what == "memory":
            gpu_memory.main(["--dry"])
        elif what == "kernels":
            gpu_kernels.main(["--dry", "--dtype", dtype, "--shapes", f"{index}", *([] if tuner else ["--fixed"])])
            if tuner:
                _tune(dtype, index)
        else:
            _calls(dtype)
        sys.stdout = sys.__stdout__
    return group, counts[False], counts[True]


def _tune(dtype: str, index: int) -> None:
    """Every candidate of the tuner, which finds no times here: what it would keep goes nowhere."""
    import torch

    from bench import gpu_launches
    from xformer_kernels.backends.triton import configs

    with tempfile.TemporaryDirectory() as folder:
        os.environ.update({configs.AUTOTUNE: "1", configs.CACHE: folder})
        configs._tuned.cache_clear()
        gpu_launches.of_call(gpu_launches.inputs(OP_SHAPES["gpu"][index], getattr(torch, dtype), "cpu", values=False))
        del os.environ[configs.AUTOTUNE]


def _calls(dtype: str) -> None:
    """Operators and layers of the benchmarks on a GPU; layers with few tokens, which take the same kernels."""
    import torch

    import xformer_kernels as xk
    from bench import gpu_launches, host
    from xformer_kernels.backends.triton import plan

    host.install()
    for shape in (*OP_SHAPES["gpu"], *OP_SHAPES["gpu-latency"]):
        gpu_launches.of_call(gpu_launches.inputs(shape, getattr(torch, dtype), "cpu", values=False))
    for layer in dict.fromkeys((*LAYER_SHAPES["gpu"], *LAYER_SHAPES["gpu-latency"])):
        C = layer.C
        for B, N in ((1, 4096), (128, 256)):
            parts: list[tuple[int, ...]] = [(B, N, C), (3 * C, C), (3 * C,), (C, C), (C,)]
            x, w, b, w2, b2 = (torch.zeros(p, dtype=getattr(torch, dtype), requires_grad=True) for p in parts)
            temperature = torch.ones(layer.heads, requires_grad=True)
            # the products beside the kernels, which are torch's, take time on a CPU: no more than the small batch
            for form in ("direct", "gram") if B == 1 and layer.C <= plan.WIDEST else ("direct",):
                y = xk.xfa_layer(x, w, b, temperature, w2, b2, form=form, backend="triton")
                torch.autograd.grad(y, (x, w), torch.zeros_like(y))


def build_cuda(archs: str, out: Path, jobs: int) -> Path:
    """The module _cuda for this Python, in `out`; it needs nvcc, CMake, Ninja and pybind11."""
    import pybind11

    build = out / "cuda"
    command: list[str] = [
        "cmake", "-S", f"{ROOT / 'csrc' / 'cuda'}", "-B", f"{build}", "-G", "Ninja", f"-DXK_CUDA_ARCHS={archs}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DXK_OUTPUT_DIRECTORY={out.resolve()}", f"-DXK_CUDA_JOBS={jobs}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    subprocess.run(["cmake", "--build", f"{build}"], check=True)
    return out / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"


def compile_all(jobs: int, tuner: bool, chosen: list[Group]) -> tuple[int, int]:
    """How many kernels were compiled, and how many the cache had."""
    total = [0, 0]
    work: Callable[[Group], tuple[Group, int, int]] = partial(compile_group, tuner=tuner)
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        for group, compiled, found in pool.imap_unordered(work, chosen, chunksize=1):
            print(f"{' '.join(map(str, group))}: {compiled} compiled, {found} found", flush=True)
            total = [total[0] + compiled, total[1] + found]
    return total[0], total[1]


def pack(out: Path) -> Path:
    """One file of all that is in the folder."""
    packed = out / "prepared.tar.xz"
    with tarfile.open(packed, "w:xz") as tar:
        for path in sorted((*out.glob("triton"), *out.glob("_cuda*.so"))):
            tar.add(path, path.name)
    return packed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of what is prepared")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--no-tuner", action="store_true", help="without other stages and the tuner's candidates")
    parser.add_argument("--only", type=int, help="one of the groups, by index")
    parser.add_argument("--cuda", metavar="ARCHS", help='also build the CUDA kernels, for "90a" or more')
    parser.add_argument("--no-triton", action="store_true", help="nothing of Triton")
    options = parser.parse_args(arguments)
    if not options.no_triton:
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ.update(TRITON_CACHE_DIR=str((options.out / "triton").resolve()), TRITON_STORE_BINARY_ONLY="1")
        chosen = groups() if options.only is None else [groups()[options.only]]
        compiled, found = compile_all(options.jobs, not options.no_tuner, chosen)
        size = sum(path.stat().st_size for path in (options.out / "triton").rglob("*") if path.is_file())
        print(f"{compiled} compiled, {found} found; the cache has {size / 1e6:.1f} MB")
    if options.cuda:
        module = build_cuda(options.cuda, options.out, options.jobs)
        print(f"{module}: {module.stat().st_size / 1e6:.1f} MB")
    packed = pack(options.out)
    print(f"{packed}: {packed.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
