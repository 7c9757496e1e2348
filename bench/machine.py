"""Metadata of results: machine, versions, allocator and commit."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from xformer_kernels import backends
from xformer_kernels.info import processor_name

ROOT = Path(__file__).parent.parent
COMMIT = "XFORMER_KERNELS_COMMIT"
# By default, glibc returns tensors above 32 MiB to the system after each call, so that the next call page-faults them
# again, and it trims the heap. With these settings it keeps the memory, as a long-running process would want. They are
# read when the process starts.
RAISED_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}


def allocator() -> str:
    """The allocator settings: "raised" if this process was started with RAISED_ALLOCATOR, otherwise "default"."""
    return "raised" if all(os.environ.get(key) == value for key, value in RAISED_ALLOCATOR.items()) else "default"


def restart_with_raised_allocator() -> None:
    """Restarts this process with glibc's thresholds raised; does nothing if they are already."""
    if allocator() != "raised":
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **RAISED_ALLOCATOR})


def give_memory_back() -> None:
    """Makes glibc return free memory to the system, so that resident memory is memory in use."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


# AMD core names by CPU family and ranges of model numbers; brand names of servers do not contain them.
ZEN: dict[int, dict[str, tuple[tuple[int, int], ...]]] = {
    23: {"zen": ((0, 0x2F),), "zen2": ((0x30, 0xFF),)},
    25: {"zen4": ((0x10, 0x1F), (0x60, 0x7F), (0xA0, 0xAF)), "zen3": ((0, 0xFF),)},
    26: {"zen5": ((0, 0xFF),)},
}
LEVELS = {"x86_64_v4": "avx512", "zen4": "avx512", "x86_64_v3": "avx2", "x86_64_v2": "sse4"}


def processor() -> str:
    """A short name: the core for AMD, otherwise the brand."""
    try:
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        found = {key.strip(): value.strip() for key, _, value in lines}
        family, model = int(found["cpu family"]), int(found["model"])
    except (OSError, KeyError, ValueError):
        found, family, model = {}, 0, 0
    if found.get("vendor_id") == "AuthenticAMD":
        for core, ranges in ZEN.get(family, {}).items():
            if any(first <= model <= last for first, last in ranges):
                return f"amd {core}"
    return re.sub(r"\((r|tm)\)|\b(cpu|processor)\b.*", "", processor_name().lower()).strip()


def level() -> str:
    """The instruction set that our kernels use; the environment may limit it."""
    cpp = backends.load("cpp")[0]
    if cpp is None or not cpp.module.LEVEL:
        return "no-kernels"
    used: str = cpp.module.LEVEL
    return LEVELS.get(used, "neon" if platform.machine() in ("aarch64", "arm64") else used)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor_name()}, {os.cpu_count()} cores, {level()}"


def slug(device: str) -> str:
    """The name of the results folder of this machine."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{processor()} {os.cpu_count()} cores {level()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def facts(device: str) -> dict[str, Any]:
    """Date, machine, system, instruction sets, threads, allocator, versions and commit."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("xformer-kernels", "torchvision", "timm", "triton", "onnxruntime", "openvino"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": device_name(device),
        "system": platform.platform(),
        "instructions": {"torch": torch.backends.cpu.get_cpu_capability().lower(), "xformer-kernels": level()},
        "threads": torch.get_num_threads(),
        "allocator": allocator(),
        "versions": versions,
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit of these files. Outside the repository, the environment variable named by COMMIT provides it."""
    if COMMIT in os.environ:
        return os.environ[COMMIT]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    rewritten = (":!bench/results", ":!README.md", ":!docs")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *rewritten)
    return (commit or "unknown") + ("-modified" if changed else "")
