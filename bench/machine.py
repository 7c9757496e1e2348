"""What a result must say about where it comes from, and what the machine can do at best."""

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

from xformer_kernels.info import processor_name

ROOT = Path(__file__).parent.parent
COMMIT = "XFORMER_KERNELS_COMMIT"
# glibc gives tensors above 32 MiB back to the system after each call and page-faults them again in the next one, and it
# trims the heap. These settings keep them: what a long-running process would choose. They are read when it starts.
RAISED_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}


def allocator() -> str:
    """ "raised" if this process was started with the settings above, else "default"."""
    return "raised" if all(os.environ.get(key) == value for key, value in RAISED_ALLOCATOR.items()) else "default"


def restart_with_raised_allocator() -> None:
    """Replaces this process by the same one with glibc's thresholds raised; does nothing where that was done."""
    if allocator() != "raised":
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **RAISED_ALLOCATOR})


def give_memory_back() -> None:
    """Makes glibc return what is free to the system, so that resident memory is memory in use."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{processor_name()}, {os.cpu_count()} cores"


def slug(device: str) -> str:
    """The name of this machine's folder of results."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def facts(device: str) -> dict[str, Any]:
    """Date, versions, machine, threads, allocator and commit."""
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
        "threads": torch.get_num_threads(),
        "allocator": allocator(),
        "versions": versions,
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit of these files; of a copy that lies outside the repository, what COMMIT says."""
    if COMMIT in os.environ:
        return os.environ[COMMIT]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!README.md")
    return (commit or "unknown") + ("-modified" if changed else "")
