from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from builds import ROOT


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """The project's files without what was built from them."""
    target = tmp_path_factory.mktemp("source") / "project"
    shutil.copytree(
        ROOT,
        target,
        ignore=shutil.ignore_patterns(
            ".*", "build", "dist", "*.egg-info", "*.so", "_no_*.txt", "__pycache__", "results"
        ),
    )
    return target


@pytest.fixture
def without_nvcc(tmp_path):
    """An environment in which nothing but nvcc is missing."""
    folders = []
    for number, folder in enumerate(os.environ["PATH"].split(os.pathsep)):
        if shutil.which("nvcc", path=folder):
            shadow = tmp_path / "path" / str(number)
            shadow.mkdir(parents=True)
            for tool in Path(folder).iterdir():
                if tool.name != "nvcc":
                    (shadow / tool.name).symlink_to(tool)
            folder = str(shadow)
        folders.append(folder)
    return {"PATH": os.pathsep.join(folders), "CUDA_HOME": "", "CUDA_PATH": "", "XFORMER_KERNELS_CUDA": ""}
