"""xformer-kernels-cuda: the CUDA module as a wheel of its own, next to a wheel of xformer-kernels without it."""

from __future__ import annotations

import shutil
import sys
from importlib.machinery import EXTENSION_SUFFIXES

import pytest
from builds import ROOT, linked, needs_compiler, needs_no_wheel, needs_nvcc, said, unpack, use, wheel

from xformer_kernels import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = "tools/cuda_wheel"
MODULE = """
def build_info():
    return dict(version="{}", compiler="nvcc 13.0.88", archs="80", ptx="80", dtypes="f32", emulated=False)
"""


def test_extra_requires_the_same_version():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["cuda"] == [f"xformer-kernels-cuda=={__version__}; platform_system == 'Linux'"]


@pytest.mark.nightly
@needs_compiler
@needs_nvcc
def test_wheel_is_used_next_to_the_main_one(source, tmp_path):
    env = {"XFORMER_KERNELS_CUDA_ARCHS": "90", "CMAKE_ARGS": "-DXK_CUDA_DTYPES=f16"}
    main, _ = wheel(source, tmp_path / "main", XFORMER_KERNELS_NO_EXTENSION="1")
    built, _ = wheel(source, tmp_path / "cuda", project=PROJECT, **env)
    installed = unpack(built, unpack(main, tmp_path / "installed"))
    facts = use(installed)
    module = facts["info"]["cuda extension"]
    assert module["loaded"] and module["distribution"] == "xformer-kernels-cuda"
    assert (module["version"], module["archs"], module["dtypes"]) == (__version__, "90", "f16")
    assert "tensors are on cpu, the kernels run on cuda" in facts["explain"]
    (metadata,) = installed.glob("xformer_kernels_cuda-*.dist-info/METADATA")
    assert f"Requires-Dist: xformer-kernels=={__version__}\n" in metadata.read_text()
    assert (metadata.parent / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert not [name for name in linked(module["file"]) or () if "cuda" in name or "torch" in name or "c10" in name]


@needs_no_wheel
def test_no_toolkit_is_an_error(source, tmp_path, without_nvcc):
    built, done = wheel(source, tmp_path, check=False, project=PROJECT, **without_nvcc)
    assert done.returncode != 0 and built is None
    assert "no CUDA toolkit of 12.0 or newer was found" in said(done)


@pytest.fixture
def installed(tmp_path):
    """An installed package without compiled modules, and a way to add CUDA modules of any version."""
    ignored = shutil.ignore_patterns("*.so", "_no_*.txt", "__pycache__")
    shutil.copytree(ROOT / "xformer_kernels", tmp_path / "xformer_kernels", ignore=ignored)

    def add(package, version):
        (tmp_path / package).mkdir(exist_ok=True)
        (tmp_path / package / "_cuda.py").write_text(MODULE.format(version))
        if package == "xformer_kernels_cuda":
            (tmp_path / package / "__init__.py").touch()

    return tmp_path, add


def test_module_of_the_same_version_is_used(installed):
    folder, add = installed
    add("xformer_kernels_cuda", __version__)
    facts = use(folder)
    module = facts["info"]["cuda extension"]
    assert module["loaded"] and module["distribution"] == "xformer-kernels-cuda"
    assert module["file"] == str(folder / "xformer_kernels_cuda" / "_cuda.py")


def test_another_version_is_refused_with_the_reason(installed):
    """The package itself works, and explain and info name both versions."""
    folder, add = installed
    add("xformer_kernels_cuda", "0.0.1")
    facts = use(folder)
    assert facts["ran"] == ["reference"]
    module = facts["info"]["cuda extension"]
    assert not module["loaded"]
    for text in (module["cause"], facts["explain"]):
        assert f"xformer-kernels-cuda is of version 0.0.1, and xformer-kernels of version {__version__}" in text
        assert f"pip install 'xformer-kernels[cuda]=={__version__}'" in text


def test_module_built_with_the_package_comes_first(installed):
    folder, add = installed
    add("xformer_kernels_cuda", __version__)
    add("xformer_kernels", __version__)
    module = use(folder)["info"]["cuda extension"]
    assert module["distribution"] == "xformer-kernels"
    assert module["file"] == str(folder / "xformer_kernels" / "_cuda.py")


def test_module_that_cannot_load_is_reported_with_its_cause(installed):
    folder, add = installed
    add("xformer_kernels_cuda", __version__)
    (folder / "xformer_kernels_cuda" / f"_cuda{EXTENSION_SUFFIXES[0]}").write_text("not a library")
    facts = use(folder)
    for text in (facts["explain"], facts["info"]["cuda extension"]["cause"]):
        assert "_cuda" in text and ("ELF" in text or "file too short" in text), text


def test_no_module_is_reported_with_what_would_bring_it(installed):
    folder, _ = installed
    cause = use(folder)["info"]["cuda extension"]["cause"]
    assert cause == "xformer_kernels._cuda was not built, and xformer-kernels-cuda is not installed"
