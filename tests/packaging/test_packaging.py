"""Building, installing and what an install says of itself; offline, without build isolation and dependencies."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# One instruction level is enough here, and a third of the time.
X86 = platform.machine() in ("x86_64", "AMD64")
ONE_LEVEL = {"CMAKE_ARGS": "-DXK_LEVELS=" + ("x86_64_v2" if X86 else "generic")}
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith(("XFORMER_KERNELS_", "CMAKE_"))}
HAS_COMPILER = any(shutil.which(name) for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler here")


def run(*command, cwd, check=True, **env):
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**CLEAN, **ONE_LEVEL, **env}, capture_output=True, text=True, timeout=600
    )
    assert not check or done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The project's files without what was built from them."""
    target = tmp_path_factory.mktemp("source") / "project"
    shutil.copytree(
        ROOT,
        target,
        ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "_C*.so", "__pycache__", "results"),
    )
    return target


def wheel(source, out, check=True, **env):
    """Builds a wheel of `source` in a copy, so that no build finds another one's leftovers."""
    copy = shutil.copytree(source, out / "copy")
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


@needs_compiler
def test_wheel_from_sdist(source, tmp_path):
    """The sdist holds all that a build needs; the wheel has the extension, which serves calls without a word."""
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", tmp_path, source, cwd=tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (project,) = (tmp_path / "unpacked").iterdir()
    built, _ = wheel(project, tmp_path, XFORMER_KERNELS_REQUIRE_EXTENSION="1")
    assert "none-any" not in built.name
    facts = use(unpack(built, tmp_path / "installed"))
    assert facts["ran"] == ["cpp"] and facts["warned"] == []
    extension = facts["info"]["extension"]
    assert extension["loaded"] and extension["version"] == facts["info"]["versions"]["xformer_kernels"]
    assert extension["levels"] == ONE_LEVEL["CMAKE_ARGS"].partition("=")[2] == extension["level in use"]


@needs_compiler
def test_nothing_of_torch_is_linked_or_included(source):
    """One build serves every torch: the sources name no header of torch's, the module none of its libraries."""
    for path in (source / "csrc").rglob("*"):
        if path.is_file():
            assert "torch/" not in path.read_text() and "ATen" not in path.read_text(), path
    from xformer_kernels import _C

    if shutil.which("ldd"):
        assert "torch" not in run("ldd", _C.__file__, cwd=source).stdout


def test_pure_python_when_asked(source, tmp_path):
    built, done = wheel(source, tmp_path, XFORMER_KERNELS_NO_EXTENSION="1")
    assert "py3-none-any" in built.name
    assert "XFORMER_KERNELS_NO_EXTENSION is set" in done.stdout + done.stderr
    facts = use(unpack(built, tmp_path / "installed"))
    assert facts["ran"] == ["reference"]
    assert len(facts["warned"]) == 1 and "slower reference" in facts["warned"][0]
    assert not facts["info"]["extension"]["loaded"]
    assert "_C" in facts["explain"]


def test_failed_build_installs_pure_python_loudly(source, tmp_path):
    built, done = wheel(source, tmp_path, CXX="/no/such/compiler")
    assert "WAS NOT BUILT" in done.stdout + done.stderr
    facts = use(unpack(built, tmp_path / "installed"))
    assert facts["ran"] == ["reference"] and len(facts["warned"]) == 1
    assert "/no/such/compiler" in facts["info"]["extension"]["why it was not built"]


def test_failed_build_is_an_error_where_the_extension_is_required(source, tmp_path):
    built, done = wheel(source, tmp_path, check=False, CXX="/no/such/compiler", XFORMER_KERNELS_REQUIRE_EXTENSION="1")
    assert done.returncode != 0 and built is None
    assert "/no/such/compiler" in done.stdout + done.stderr


def test_extension_that_cannot_load_is_reported_with_its_cause(tmp_path):
    """By info, by explain and by the warning: in the words of the loader."""
    from importlib.machinery import EXTENSION_SUFFIXES

    shutil.copytree(
        ROOT / "xformer_kernels", tmp_path / "xformer_kernels", ignore=shutil.ignore_patterns("_C*.so", "__pycache__")
    )
    (tmp_path / "xformer_kernels" / f"_C{EXTENSION_SUFFIXES[0]}").write_text("not a library")
    facts = use(tmp_path)
    assert facts["ran"] == ["reference"]
    for text in (facts["warned"][0], facts["explain"], facts["info"]["extension"]["cause"]):
        assert "_C" in text and ("ELF" in text or "file too short" in text or "mach-o" in text), text


def test_info_prints(tmp_path):
    text = run(sys.executable, "-m", "xformer_kernels.info", cwd=ROOT).stdout
    for word in ("xformer_kernels:", "torch:", "backends", "reference: yes"):
        assert word in text
    facts = json.loads(run(sys.executable, "-m", "xformer_kernels.info", "--json", cwd=ROOT).stdout)
    assert facts["versions"]["xformer_kernels"] and facts["auto"] in facts["backends"]


@pytest.mark.skipif(not X86, reason="one level only")
def test_unusable_level_is_reported():
    """A level that is asked for and is not there turns the kernels off, with the reason."""
    facts = json.loads(
        run(sys.executable, "-m", "xformer_kernels.info", "--json", cwd=ROOT, XFORMER_KERNELS_CPU_LEVEL="x87").stdout
    )
    if facts["extension"]["loaded"]:
        assert facts["auto"] == "reference"
        assert "XFORMER_KERNELS_CPU_LEVEL" in facts["backends"]["cpp"][0]
