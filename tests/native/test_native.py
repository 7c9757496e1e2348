"""The kernels without Python: the C API compared with plain loops, and the inner loops compiled for arm64."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from inner_loops import FLAGS, ROOT, compiled


def need(*tools):
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


def run(*command, **more):
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **more)
    assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    return done.stdout


@pytest.mark.nightly
def test_c_api(tmp_path):
    """At the level that compiles fastest: half a minute on one core. test_levels.py and make test-arm64 run others."""
    need("cmake", "ninja", os.environ.get("CXX", "c++"))
    options = ("-DXK_PYTHON=OFF", "-DXK_NATIVE_TESTS=ON", "-DXK_LEVELS=generic", "-DXK_WERROR=ON")
    run("cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *options)
    run("cmake", "--build", tmp_path, "-j", "1")
    environment = {**os.environ, "XFORMER_KERNELS_CPU_LEVEL": "generic"}
    said = run(tmp_path / "tests/native/test_c_api", env=environment)
    assert re.fullmatch(r"generic: \d{7,} elements compared, largest error 0\.\d+ of its tolerance, 0 failures\n", said)

    environment["XFORMER_KERNELS_CPU_LEVEL"] = "x86_64_v9"
    absent = subprocess.run([tmp_path / "tests/native/test_c_api"], env=environment, capture_output=True, text=True)
    assert absent.returncode == 77 and absent.stdout.startswith("not run: x86_64_v9 was not built")


def test_inner_loops_of_arm64(tmp_path):
    """Instructions per multiply-add and register spills of the tiles that compute most of a product."""
    need("aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump")
    version = run("aarch64-linux-gnu-g++", "-dumpversion").strip()
    if version.split(".")[0] != "12":
        pytest.skip(f"the expected figures are for GCC 12, got {version}")
    gram, mix = (compiled(tmp_path)[kind] for kind in ("gram", "mix"))
    assert (gram.rows, gram.vectors, mix.rows, mix.vectors) == (6, 4, 5, 4)
    # the loops are unrolled by 2 and by 4 steps of k
    assert gram.count("fmla") == 2 * 6 * 4 and mix.count("fmla") == 4 * 5 * 4
    assert gram.spills == mix.spills == 0
    assert gram.per_multiply_add <= 1.28
    assert mix.per_multiply_add <= 1.34


def test_flags_are_those_of_the_build():
    text = (Path(ROOT) / "CMakeLists.txt").read_text()
    assert all(flag in text or flag in ("-std=c++20", "-fPIC") for flag in FLAGS)
