"""The examples do what they say, in small; each returns 1 if its own comparison fails."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# packages that an example needs beside torch, and whether a push waits for it
SCRIPTS = {
    "custom_map": ((), True),
    "linear_attention": ((), True),
    "patch_timm": (("timm",), True),
    "restore_photo": ((), True),
    "train_digits": (("sklearn",), False),
    "florence_tower": (("transformers",), False),
    "sana_block": (("diffusers",), False),
    "export_onnx": (("timm", "onnx", "onnxscript", "onnxruntime"), False),
}
ELSEWHERE = {"token_parallel": "tests/test_parallel.py"}
NOTEBOOKS = {"operator": ("matplotlib",), "patch_a_model": ("timm",)}


def params(scripts):
    return [
        pytest.param(name, needed, marks=[] if on_push else [pytest.mark.nightly])
        for name, (needed, on_push) in scripts.items()
    ]


@pytest.mark.parametrize("name, needed", params(SCRIPTS))
def test_script(name, needed, capsys):
    for package in needed:
        pytest.importorskip(package, reason=f"the example shows {package}, an optional dependency")
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["--quick"]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.count("\n") >= 2  # what a user wants to see


@pytest.mark.nightly
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name, monkeypatch, capsys):
    """Its code cells, in order."""
    for package in NOTEBOOKS[name]:
        pytest.importorskip(package, reason=f"the notebook uses {package}, an optional dependency")
    if "matplotlib" in NOTEBOOKS[name]:
        monkeypatch.setenv("MPLBACKEND", "agg")
    names = {}
    for number, source in enumerate(cells(name)):
        exec(compile(source, f"{name}.ipynb, cell {number}", "exec"), names)
    assert capsys.readouterr().out


def cells(name):
    notebook = json.loads((EXAMPLES / f"{name}.ipynb").read_text())
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "outputs are not committed"
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_every_example_is_run_and_listed():
    files = {path.stem for path in EXAMPLES.glob("*.py")} | {path.stem for path in EXAMPLES.glob("*.ipynb")}
    assert files == {*SCRIPTS, *ELSEWHERE, *NOTEBOOKS}
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"`examples/{name}." in readme for name in files)
    for name, test in ELSEWHERE.items():
        assert f"{name}.py" in (EXAMPLES.parent / test).read_text()
