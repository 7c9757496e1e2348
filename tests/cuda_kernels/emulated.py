"""Builds and loads the module _cuda whose kernels run on the CPU: csrc/cuda compiled over the shim beside this file."""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
BUILDS = HERE.parents[1] / "build" / "emulated"
NAME = "xformer_kernels._cuda"


def why_not() -> str:
    """Why it cannot be built here, or nothing."""
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    if not any(shutil.which(name) for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++"))):
        missing.append("a C++ compiler")
    try:
        import pybind11  # noqa: F401
    except ImportError:
        missing.append("pybind11")
    return f"{', '.join(missing)} not found, which the emulated kernels are built with" if missing else ""


def build(
    *,
    dtypes: str = "f32;bf16;f16",
    sanitize: str = "",
    planted: str = "none",
    target: str = "_cuda",
) -> Path:
    """The folder of the target (of CMakeLists.txt), built anew where its sources have changed.

    Raises with the compiler's words.
    """
    import pybind11

    options = {"XK_DTYPES": dtypes, "XK_SANITIZE": sanitize, "XK_PLANTED": planted}
    folder = BUILDS / "-".join(filter(None, (sanitize.replace(",", "-"), planted, dtypes.replace(";", "-"))))
    configure = [
        "cmake", "--fresh", "-S", HERE, "-B", folder / "objects", "-G", "Ninja", f"-DXK_OUTPUT_DIRECTORY={folder}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *(f"-D{name}={value}" for name, value in options.items()),
    ]  # fmt: skip
    # compilers are not what is looked at where a sanitizer is loaded into this process, and slower with it
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that run tests side by side build one after another
        for command in (configure, ["cmake", "--build", folder / "objects", "--target", target]):
            done = subprocess.run([str(x) for x in command], capture_output=True, text=True, env=environment)
            if done.returncode:
                raise RuntimeError(f"the emulated kernels were not built:\n{(done.stdout + done.stderr)[-4000:]}")
    return folder if target == "_cuda" else folder / target


def load(folder: Path) -> None:
    """Puts the module in the place of the one for GPUs, before anything imports that."""
    (path,) = folder.glob("_cuda*.so")
    sys.modules[NAME] = module_at(path, NAME)


def module_at(path: Path, name: str) -> ModuleType:
    """The module of that file, with devices and errors of its own where both the file and the name are new."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitize", default="", help="address,undefined or thread")
    if why_not():
        sys.exit(why_not())
    print(build(sanitize=parser.parse_args().sanitize))
