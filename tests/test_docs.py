"""What the documents say is what is there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import xformer_kernels

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BACKBONE = (ROOT / "docs" / "backbone.md").read_text()
TRAINING = (ROOT / "docs" / "training.md").read_text()
SEGMENTATION = (ROOT / "docs" / "segmentation.md").read_text()
INTEGRATIONS = (ROOT / "docs" / "integrations.md").read_text()
TASKS = {"detect": "detection", "segment": "segmentation"}


def test_table_of_results_comes_from_the_result_files(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    sys.modules.pop("bench", None)
    from bench import table

    (folder,) = re.findall(re.escape(table.BEGIN).replace(r"\{\}", "(.*?)"), README)
    assert table.render(ROOT / folder) in README
    for begin, render, text in (
        (table.BACKBONES, table.render_backbones, README),
        (table.GPU, table.render_gpu, README),
        (table.MACHINES, table.render_machines, README),
        (table.FORWARD, table.render_forward, BACKBONE),
        (table.TRAINING, table.render_training, BACKBONE),
        (table.LEARNING, table.render_learning, TRAINING),
        (table.SEGMENTATION, table.render_segmentation, SEGMENTATION),
        (table.VARIANTS, table.render_variants, INTEGRATIONS),
    ):
        (folder,) = re.findall(re.escape(begin).replace(r"\{\}", "(.*?)"), text)
        assert render(ROOT / folder) in text
    for task, page in TASKS.items():
        text = (ROOT / "docs" / f"{page}.md").read_text()
        (folder,) = re.findall(re.escape(table.SCENES.format(task)).replace(r"\{\}", "(.*?)"), text)
        assert table.render_scenes(task, ROOT / folder) in text


def test_public_names_are_documented():
    for name in xformer_kernels.__all__:
        assert f"`{name}" in README, name
        assert getattr(xformer_kernels, name).__doc__


def test_example_in_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        if "timm" in block:
            pytest.importorskip("timm", reason="the README's example of a timm model needs timm")
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("page", [INTEGRATIONS, BACKBONE], ids=["integrations", "backbone"])
def test_examples_of_the_pages_run(page):
    """Those that read no file."""
    timm = pytest.importorskip("timm", reason="the model is timm's")
    model = timm.create_model("xcit_nano_12_p16_224", depth=1, img_size=64)
    blocks = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if not re.search("onnx|PIL", block)]
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "page", "exec"), {"model": model})


def test_commands_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^\s*make ([a-z-]+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_version_is_in_the_changelog():
    assert f"## {xformer_kernels.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_family_that_replace_attention_serves_is_documented():
    from xformer_kernels.integrations.families import FAMILIES

    table = (ROOT / "docs" / "integrations.md").read_text()
    assert re.findall(r"^\| `([^`]+)` \|", table, re.M) == list(FAMILIES)
