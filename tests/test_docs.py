"""What the documents say is what the code does: tables, figures, code blocks, commands and links."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import re
import sys
import typing
from pathlib import Path

import pytest
import torch

import xformer
import xformer_kernels

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "examples" / "README.md",
        *ROOT.glob("docs/**/*.md"),
    )
}
README = PAGES["README.md"]
TASKS = {"detect": "detection", "segment": "segmentation"}
BLOCK = re.compile(
    r"(?:<!-- (?P<note>[^\n]*) -->\n)?```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<printed>.*?)```)?", re.S
)


@pytest.fixture
def bench(monkeypatch):
    """The package of this checkout, whatever else is called so."""
    monkeypatch.syspath_prepend(str(ROOT))
    sys.modules.pop("bench", None)
    return importlib.import_module


def folder_of(begin, text):
    (folder,) = re.findall(re.escape(begin).replace(r"\{\}", "(.*?)"), text)
    return ROOT / folder


def test_tables_come_from_the_result_files(bench):
    table = bench("bench.table")
    for page, renderers in (
        table.ON_CPU | {"docs/benchmarks.md": table.ON_CPU["docs/benchmarks.md"] + (table.render_gpu,)}
    ).items():
        for begin, render in zip(begins(table, page), renderers, strict=True):
            assert render(folder_of(begin, PAGES[page])) in PAGES[page], (page, begin)


def begins(table, page):
    """The first lines of the tables of a page, in the order of their renderers."""
    return {
        "README.md": (table.SUMMARY,),
        "docs/benchmarks.md": (
            table.BEGIN,
            table.MACHINES,
            table.LAYERS,
            table.LAYER_MACHINES,
            table.MODELS,
            table.BACKBONES,
            table.GPU,
        ),
        "docs/backbone.md": (table.FORWARD, table.RUNTIMES, table.TRAINING),
        "docs/training.md": tuple(table.LEARNING.values()),
        "docs/detection.md": (table.SCENES.format("detect"),),
        "docs/segmentation.md": (table.SCENES.format("segment"), table.SEGMENTATION),
        "docs/integrations.md": (table.VARIANTS,),
    }[page]


def test_table_of_support_is_what_the_backends_say(bench, need_backend):
    for backend in ("cpp", "triton", "cuda"):
        need_backend(backend)
    assert bench("bench.support").render() in README


def test_figures_show_these_numbers(bench):
    figures = bench("bench.figures")
    for name in figures.FIGURES:
        drawn = (figures.FOLDER / f"{name}.svg").read_text()
        (description,) = re.findall(r"<dc:description>(.*?)</dc:description>", drawn, re.S)
        assert description.replace("&gt;", ">") == figures.description(name), (
            f"python -m bench.figures: {name} has changed"
        )


def test_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_public_names_are_documented():
    shown = re.findall(r"^::: (\S+)", "\n".join(PAGES[page] for page in PAGES if page.startswith("docs/api/")), re.M)
    for name in xformer_kernels.__all__:
        described = [
            path for path in shown if path.split(".")[-1] == name or path.startswith(f"xformer_kernels.{name}.")
        ]
        assert described, f"docs/api has no {name}"
        assert getattr(xformer_kernels, name).__doc__
        assert f"`{name}`" in PAGES["docs/index.md"], name
    for name in xformer.__all__:
        assert re.search(rf"xformer(\.\w+)*\.{name}\b", PAGES["docs/api/backbone.md"]), f"docs/api has no {name}"
    for explain in (xformer_kernels.explain, xformer_kernels.explain_layer):
        result = typing.get_type_hints(explain)["return"].__name__
        assert any(path.endswith(f".{result}") for path in shown), f"docs/api has no {result}"


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(PAGES[page])])
def test_code_blocks_run(page, monkeypatch, tmp_path, forget):
    """In their order, in one namespace per page; a text block after one is what it prints."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))  # as torchrun sets them
    monkeypatch.setattr(xformer_kernels.backends, "PATHS", dict(xformer_kernels.backends.PATHS))
    names = {"__name__": page}
    try:
        for block in BLOCK.finditer(PAGES[page]):
            if (block["note"] or "").startswith("not run: "):
                continue
            for module in imported(block["code"]):
                if module not in ("torch", "xformer", "xformer_kernels"):
                    pytest.importorskip(module, reason=f"{page} uses {module}, an optional dependency")
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(block["code"], page, "exec"), names)
            if block["printed"] is not None:
                assert printed.getvalue() == block["printed"]
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        xformer_kernels.backends._loaded.pop("slate", None)


def imported(code):
    """Packages that a block imports."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_blocks_that_are_not_run_say_why():
    for page, text in PAGES.items():
        for reason in re.findall(r"^<!-- not run:(.*?)-->", text, re.M):
            assert len(reason.split()) >= 3, page
        assert len(re.findall("```python", text)) == len(BLOCK.findall(text)), page


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page, text in PAGES.items():
        for target in re.findall(r"^    make ([a-z][a-z0-9-]*)|`make ([a-z][a-z0-9-]*)`", text, re.M):
            assert re.search(rf"^{''.join(target)}:", makefile, re.M), (page, target)
        for module in re.findall(r"python -m ((?:xformer|xformer_kernels|bench|experiments)(?:\.\w+)*)", text):
            assert importlib.util.find_spec(module), (page, module)
        for script in re.findall(r"`?(examples/\w+\.(?:py|ipynb))", text):
            assert (ROOT / script).exists(), (page, script)


def test_links_lead_to_files_and_headings():
    for page, text in PAGES.items():
        text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
        for link, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
            target = (ROOT / page).parent / link if link else ROOT / page
            assert target.exists(), (page, link)
            if anchor:
                headings = re.findall(r"^#+ (.*)", target.read_text(), re.M)
                assert anchor in {slug(heading) for heading in headings}, (page, link, anchor)


def slug(heading):
    """The anchor of a heading, the same on GitHub and on the site."""
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def test_version_is_in_the_changelog():
    assert f"## {xformer_kernels.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_family_that_replace_attention_serves_is_documented():
    from xformer_kernels.integrations.families import FAMILIES

    assert re.findall(r"^\| `([^`]+)` \| .* \| .* \|$", PAGES["docs/integrations.md"], re.M) == list(FAMILIES)
