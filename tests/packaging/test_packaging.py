"""Building, installing and what an install says of itself; offline, without build isolation and dependencies."""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig

import pytest
from builds import (
    IN_WHEELS,
    LEVEL,
    NVCC,
    QUICKER,
    ROOT,
    X86,
    linked,
    needs_compiler,
    needs_no_wheel,
    needs_nvcc,
    pretended_toolkit,
    run,
    said,
    unpack,
    use,
    wheel,
)


@needs_compiler
def test_wheel_from_sdist(source, tmp_path, without_nvcc):
    """The sdist holds all that a build needs; the wheel has the extension, which serves calls without a word.

    No CUDA toolkit is no error, where one can be hidden: one line, and the reason in info.
    """
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", tmp_path, source, cwd=tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (project,) = (tmp_path / "unpacked").iterdir()
    hidden = {} if IN_WHEELS else without_nvcc
    built, done = wheel(project, tmp_path, **QUICKER, **hidden, XFORMER_KERNELS_REQUIRE_EXTENSION="1")
    assert "none-any" not in built.name
    facts = use(unpack(built, tmp_path / "installed"))
    assert facts["ran"] == ["cpp"] and facts["warned"] == []
    extension = facts["info"]["extension"]
    assert extension["loaded"] and extension["version"] == facts["info"]["versions"]["xformer_kernels"]
    assert extension["levels"] == LEVEL == extension["level in use"]
    assert (tmp_path / "installed" / "xformer" / "recipes" / "configs" / "small.toml").is_file()
    assert not (tmp_path / "installed" / "experiments").exists()
    if hidden:
        lines = [line for line in said(done).splitlines() if "xformer_kernels._cuda" in line]
        assert len(lines) == 1 and "was not built: no CUDA toolkit" in lines[0], lines
        module = facts["info"]["cuda extension"]
        assert not module["loaded"] and module["files"] == []
        assert "no nvcc in CUDA_HOME" in module["why it was not built"]


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
    assert facts["info"]["cuda extension"]["why it was not built"] == "XFORMER_KERNELS_CUDA=0 was set"


def test_failed_build_is_an_error_where_the_extension_is_required(source, tmp_path):
    built, done = wheel(source, tmp_path, check=False, CXX="/no/such/compiler", XFORMER_KERNELS_REQUIRE_EXTENSION="1")
    assert done.returncode != 0 and built is None
    assert "/no/such/compiler" in done.stdout + done.stderr


def test_extension_that_cannot_load_is_reported_with_its_cause(tmp_path):
    """By info, by explain and by the warning: in the words of the loader."""
    from importlib.machinery import EXTENSION_SUFFIXES

    shutil.copytree(
        ROOT / "xformer_kernels", tmp_path / "xformer_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    (tmp_path / "xformer_kernels" / f"_C{EXTENSION_SUFFIXES[0]}").write_text("not a library")
    facts = use(tmp_path)
    assert facts["ran"] == ["reference"]
    for text in (facts["warned"][0], facts["explain"], facts["info"]["extension"]["cause"]):
        assert "_C" in text and ("ELF" in text or "file too short" in text or "mach-o" in text), text


def test_sources_that_are_not_built_are_reported_as_such(tmp_path):
    shutil.copytree(
        ROOT / "xformer_kernels", tmp_path / "xformer_kernels", ignore=shutil.ignore_patterns("*.so", "_no_*.txt")
    )
    (tmp_path / "csrc").mkdir()
    assert "pip install -e ." in use(tmp_path)["info"]["extension"]["cause"]


def test_info_prints(capsys):
    from xformer_kernels import info

    text = run(sys.executable, "-m", "xformer_kernels.info", cwd=ROOT).stdout
    for word in ("xformer_kernels:", "torch:", "distribution: xformer-kernels", "backends", "reference: yes"):
        assert word in text
    assert not info.main(["--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["xformer_kernels"] and facts["auto"] in facts["backends"]


def test_unusable_backend_is_reported(monkeypatch, capsys):
    from xformer_kernels import info

    # cuda in a process of its own, since the kernels may be emulated in this one
    texts = {"cuda": run(sys.executable, "-m", "xformer_kernels.info", cwd=ROOT, XFORMER_KERNELS_BACKEND="cuda").stdout}
    monkeypatch.setenv("XFORMER_KERNELS_BACKEND", "none")
    assert not info.main([])
    texts["none"] = capsys.readouterr().out
    for asked, text in texts.items():
        assert f"XFORMER_KERNELS_BACKEND: {asked}" in text and "reference: yes" in text
        auto = next(line for line in text.splitlines() if line.startswith("auto: "))
        assert "XFORMER_KERNELS_BACKEND" in auto and asked in auto


@pytest.mark.skipif(not X86, reason="one level only")
def test_unusable_level_is_reported():
    """A level that is asked for and is not there turns the kernels off, with the reason."""
    facts = json.loads(
        run(sys.executable, "-m", "xformer_kernels.info", "--json", cwd=ROOT, XFORMER_KERNELS_CPU_LEVEL="x87").stdout
    )
    if facts["extension"]["loaded"]:
        assert facts["auto"] == "reference"
        assert "XFORMER_KERNELS_CPU_LEVEL" in facts["backends"]["cpp"][0]


# The CUDA module: built, or not. No GPU is needed, and none is looked for.


@pytest.mark.nightly
@needs_compiler
@needs_nvcc
def test_wheel_with_cuda(source, tmp_path):
    """With nvcc, the wheel has the module: it needs no library of CUDA's or torch's, nor a driver to be imported."""
    env = {"XFORMER_KERNELS_CUDA_ARCHS": "90;999", "CMAKE_ARGS": QUICKER["CMAKE_ARGS"] + " -DXK_CUDA_DTYPES=f16"}
    required = dict.fromkeys((f"XFORMER_KERNELS_{name}" for name in ("REQUIRE_EXTENSION", "CUDA", "WERROR")), "1")
    built, done = wheel(source, tmp_path, **env, **required)
    assert "sm_999 is left out" in said(done)
    installed = unpack(built, tmp_path / "installed")
    facts = use(installed)
    assert facts["ran"] == ["cpp"] and facts["warned"] == []
    module = facts["info"]["cuda extension"]
    assert module["loaded"] and module["version"] == facts["info"]["versions"]["xformer_kernels"]
    assert (module["archs"], module["ptx"], module["dtypes"]) == ("90", "90", "f16")
    assert module["compiler"].startswith("nvcc ")
    (log,) = (tmp_path / "copy" / "build").glob("**/ptxas.log")
    assert "for 'sm_90'" in log.read_text() and "spill stores" in log.read_text()

    libraries = linked(module["file"])
    if libraries is not None:
        assert not [name for name in libraries if "cuda" in name or "torch" in name or "c10" in name], libraries
    assert not [path.name for path in installed.rglob("lib*.so*")], "libraries are packed into the wheel"
    if shutil.which("nm"):
        # Calls of its own run time can go nowhere else, and nobody else's come to it.
        exported = run("nm", "-D", "--defined-only", module["file"], cwd=tmp_path).stdout
        assert "PyInit__cuda" in exported and " cuda" not in exported and " cu" not in exported

    # Without torch, and so without whatever it has loaded; and importing the package does not load it.
    alone = "import sys; sys.path.insert(0, sys.argv[1]); import _cuda; print(_cuda.build_info()['archs'])"
    no_driver = {"LD_LIBRARY_PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    folder = installed / "xformer_kernels"
    assert run(sys.executable, "-c", alone, folder, cwd=tmp_path, **no_driver).stdout.strip() == "90"
    lazy = "import sys, xformer_kernels; print([name for name in sys.modules if name.endswith('_cuda')])"
    lazily = run(sys.executable, "-c", lazy, cwd=installed, PYTHONPATH=str(installed))
    assert "xformer_kernels._cuda" not in lazily.stdout


@needs_no_wheel
@pytest.mark.parametrize("old", [False, True])
def test_no_toolkit_is_an_error_where_cuda_is_required(source, tmp_path, without_nvcc, old):
    env = {**without_nvcc, **(pretended_toolkit(tmp_path / "toolkit", "11.8") if old else {})}
    built, done = wheel(source, tmp_path, check=False, **{**env, "XFORMER_KERNELS_CUDA": "1"})
    assert done.returncode != 0 and built is None
    assert "XFORMER_KERNELS_CUDA=1 was set, and no CUDA toolkit" in said(done)
    assert ("nvcc is release 11.8" if old else "no nvcc in CUDA_HOME") in said(done)


@pytest.mark.nightly
@needs_compiler
def test_failed_cuda_build_keeps_the_cpu_kernels(source, tmp_path):
    env = {**QUICKER, **pretended_toolkit(tmp_path / "toolkit", "13.0")}
    built, done = wheel(source, tmp_path, XFORMER_KERNELS_REQUIRE_EXTENSION="1", **env)
    assert "xformer_kernels._cuda WAS NOT BUILT" in said(done)
    facts = use(unpack(built, tmp_path / "installed"))
    assert facts["ran"] == ["cpp"]
    module = facts["info"]["cuda extension"]
    assert not module["loaded"] and "failed with exit status" in module["why it was not built"]


def test_contradictions_are_errors(source, tmp_path):
    _, done = wheel(source, tmp_path, check=False, XFORMER_KERNELS_NO_EXTENSION="1", XFORMER_KERNELS_CUDA="1")
    assert done.returncode != 0 and "contradict each other" in said(done)


@needs_compiler
@needs_nvcc
@pytest.mark.parametrize(
    ("archs", "message"), [("999", "knows none of the architectures '999'"), ("80;sm_90", "has 'sm_90'")]
)
def test_unknown_architectures_are_errors(tmp_path, source, archs, message):
    pybind11 = pytest.importorskip("pybind11")
    done = run(
        "cmake", "-S", source / "csrc" / "cuda", "-B", tmp_path, "-G", "Ninja", f"-DXK_CUDA_ARCHS={archs}",
        f"-DCMAKE_CUDA_COMPILER={NVCC or IN_WHEELS[0]}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}", cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and message in " ".join(said(done).split())


@needs_no_wheel
def test_stale_modules_go(source, tmp_path, without_nvcc):
    """A module of an earlier build is neither imported from an editable install nor packed into a wheel."""
    copy = shutil.copytree(source, tmp_path / "copy")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    stale = [copy / "xformer_kernels" / (name + suffix) for name in ("_C", "_cuda")]
    for path in stale:
        path.write_text("old")
    command = "from setuptools import build_meta; build_meta.build_editable('wheels')"
    (copy / "wheels").mkdir()
    run(sys.executable, "-c", command, cwd=copy, CXX="/no/such/compiler", **without_nvcc)
    assert not any(path.exists() for path in stale)
    note = copy / "xformer_kernels" / "_no_cuda.txt"
    assert "no CUDA toolkit" in note.read_text()
    for path in stale:
        path.write_text("old")
    run(sys.executable, "-c", command, cwd=copy, XFORMER_KERNELS_NO_EXTENSION="1")
    assert not any(path.exists() for path in (*stale, note))
