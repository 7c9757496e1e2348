"""Builds wheels of the project and asks what was installed; offline, without build isolation and dependencies."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# One instruction level is enough here, and a third of the time.
X86 = platform.machine() in ("x86_64", "AMD64")
LEVEL = "x86_64_v2" if X86 else "generic"
# Without the CUDA module too, which takes minutes, but for the tests of it.
QUICK = {"CMAKE_ARGS": f"-DXK_LEVELS={LEVEL}", "XFORMER_KERNELS_CUDA": "0"}
QUICKER = {"CMAKE_ARGS": f"-DXK_LEVELS={LEVEL} -DCMAKE_BUILD_TYPE=None"}  # not optimized
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith(("XFORMER_KERNELS_", "CMAKE_"))}
HAS_COMPILER = any(shutil.which(name) for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler here")
IN_WHEELS = list(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc"))
HOMES = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
NVCC = next(filter(None, (shutil.which("nvcc", path=path) for path in (*HOMES, os.environ["PATH"]))), None)
needs_nvcc = pytest.mark.skipif(NVCC is None and not IN_WHEELS, reason="there is no nvcc here")
needs_no_wheel = pytest.mark.skipif(bool(IN_WHEELS), reason="the nvcc of the wheels cannot be hidden")


def run(*command, cwd, check=True, **env):
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**CLEAN, **QUICK, **env}, capture_output=True, text=True, timeout=600
    )
    assert not check or done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done


def wheel(source, out, check=True, project=".", **env):
    """Builds a wheel of a project in `source`, in a copy, so that no build finds another one's leftovers."""
    copy = shutil.copytree(source, out / "copy") / project
    done = run(
        sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", out, copy,
        cwd=out, check=check, **env,
    )  # fmt: skip
    wheels = list(out.glob("*.whl"))
    return (wheels[0] if wheels else None), done


def unpack(wheel, target):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


USE = """
import json, sys, warnings
# An editable install of the project would lend this copy the modules that it lacks.
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
import torch, xformer_kernels as xk
from xformer_kernels import dispatch, info
q, k, v = torch.randn(3, 2, 2, 17, 5, requires_grad=True).unbind(0)
with warnings.catch_warnings(record=True) as warned, dispatch.record() as ran:
    warnings.simplefilter("always")
    xk.xfa(q, k, v, torch.ones(2)).sum().backward()
print(json.dumps({
    "file": xk.__file__, "ran": sorted({name for name, _ in ran}), "warned": [str(w.message) for w in warned],
    "info": info.collect(), "explain": str(xk.explain(q, k, v, torch.ones(2))),
}))
"""


def use(installed):
    """What an installed copy does when it is asked for xfa, in a process of its own."""
    facts = json.loads(run(sys.executable, "-c", USE, cwd=installed, PYTHONPATH=str(installed)).stdout)
    assert Path(facts["file"]).is_relative_to(installed)
    return facts


def pretended_toolkit(home, release):
    """An nvcc that knows its release and nothing else."""
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --version ] && echo "Cuda compilation tools, release {release}, V{release}.99" && exit\n'
        "echo this nvcc only pretends >&2\nexit 1\n"
    )
    nvcc.chmod(0o755)
    return {"CUDA_HOME": str(home), "XFORMER_KERNELS_CUDA": ""}


def said(done):
    return done.stdout + done.stderr


def linked(module):
    """The libraries that a module names, or None where nothing here can tell."""
    if not shutil.which("readelf"):
        return None
    lines = run("readelf", "-d", module, cwd="/").stdout.splitlines()
    return [line.partition("[")[2].rstrip("]") for line in lines if "(NEEDED)" in line]
