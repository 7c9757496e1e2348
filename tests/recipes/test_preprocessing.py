"""Preprocessing of a card: in exported files, and in the code of the documentation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves

pytest.importorskip("timm")
pytest.importorskip("torchvision", reason="torchvision is not installed")

import xformer
from experiments.shapes import make_scene
from xformer import __main__ as command
from xformer.backbone import VARIANTS, Stage, Variant
from xformer.errors import UsageError
from xformer.recipes.card import Card
from xformer.recipes.data.transforms import to_tensor
from xformer.recipes.export import export
from xformer.recipes.preprocessing import Preprocessed
from xformer.recipes.weights import build_model, save_weights

PILLOW_13 = int(PIL.__version__.split(".")[0]) >= 13
SIZES = [(75, 100), (133, 71), (97, 97), (32, 32), (64, 31), (9, 14), (5, 3), (1, 4), (33, 32)]
TALL = [(301, 97), (250, 40), (40, 4), (200, 100), (203, 101)] if PILLOW_13 else []
"""Pillow 13 and newer resize these along height first, as exported files do."""
STEPS = Variant((Stage(8, (2,), 3), Stage(8, (2,), 3), Stage(8, (2,), 3), Stage(8, (2,), 3, 32, 1, 1)), 16)


def picture(height, width):
    rng = np.random.default_rng(height * 1000 + width)
    if min(height, width) >= 64:
        return make_scene(rng, height, width).image
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def evaluated(card, pixels):
    """An image as the evaluation prepares it, (1, 3, H, W)."""
    image = Image.fromarray(pixels)
    if card.task == "segment":
        return to_tensor(image, card.mean, card.std)[None]
    if card.task == "detect":
        from xformer.recipes.data.detection import letterbox

        return letterbox(image, {"boxes": torch.zeros(0, 4)}, card.image_size)[0][None]
    from xformer.recipes.data.transforms import eval_transform

    return eval_transform(card, card.mean, card.std)(image)[None]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.95, 0.875, 0.9])
def test_documented_lines_are_the_evaluation(crop_pct, interpolation):
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    (block,) = re.findall(r"<!-- preparation -->\n```python\n(.*?)```", text, re.S)
    names = {}
    exec(compile(block, "docs/export.md", "exec"), names)
    for size in (32, 45):
        card = Card("", 5, image_size=size, crop_pct=crop_pct, interpolation=interpolation)
        for sides in SIZES + TALL:
            pixels = picture(*sides)
            got = names["prepare"](Image.fromarray(pixels), json.loads(json.dumps(vars(card))))
            assert got.dtype == np.float32 and got.flags.c_contiguous
            assert torch.equal(torch.from_numpy(got), evaluated(card, pixels)), sides


@pytest.mark.parametrize("task", ["classify", "detect", "segment"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.95, 0.875])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_pillows(task, crop_pct, interpolation):
    for size in (32, 45):
        card = Card("", 5, task=task, image_size=size, crop_pct=crop_pct, interpolation=interpolation)
        prepare = Preprocessed(torch.nn.Identity(), card).prepare
        for sides in SIZES + TALL:
            pixels = picture(*sides)
            got, expected = prepare(torch.from_numpy(pixels.copy())[None]), evaluated(card, pixels)
            assert got.dtype == torch.float32 and got.shape == expected.shape
            if task == "classify":
                assert torch.equal(got, expected), sides
            else:  # torchvision has two ways of dividing by 255
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def made(task, monkeypatch):
    """A small model of the task and its card."""
    monkeypatch.setitem(VARIANTS, "xformer_xxs", STEPS)
    options = {"classify": {}, "segment": {"width": 16}, "detect": {"widths": [8, 16, 16]}}[task]
    card = Card("xformer_xxs", 5, task=task, image_size=64, crop_pct=0.875, options=options)
    torch.manual_seed(0)
    model = xformer.XFormer(STEPS, 5) if task == "classify" else build_model(card)
    with torch.no_grad():
        for _ in range(3):
            model(2 * torch.randn(4, 3, 64, 64) + 1)
    return model.eval(), card


def runner(path):
    """A function that runs an exported file on pixels."""
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()
        return lambda pixels: tree_leaves(module(torch.from_numpy(pixels)))
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda pixels: [torch.from_numpy(y) for y in session.run(None, {"images": pixels})]


@pytest.mark.parametrize(
    "task, ending",
    [
        ("classify", "pt2"),
        ("segment", "onnx"),
        pytest.param("detect", "onnx", marks=pytest.mark.nightly),
        pytest.param("classify", "onnx", marks=pytest.mark.nightly),
        pytest.param("detect", "pt2", marks=pytest.mark.nightly),
        pytest.param("segment", "pt2", marks=pytest.mark.nightly),
    ],
)
def test_files_take_pixels(task, ending, tmp_path, monkeypatch):
    """Exported files with preprocessing give the outputs of the model after the evaluation's transform."""
    if ending == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model, card = made(task, monkeypatch)
    fixed = {"size": (75, 100), "batch": 2} if task == "segment" and ending == "onnx" else {}
    if task == "segment" and not fixed:
        fixed = {"size": "dynamic"}
    if task == "detect" and ending == "onnx":
        fixed = {"batch": 2}
    result = export(model, card, tmp_path / f"m.{ending}", preprocessing=True, **fixed)
    run = runner(result.path)
    sides = [(75, 100)] if task == "segment" and ending == "onnx" else [(75, 100), (133, 71), (64, 64), (40, 50), *TALL]
    for height, width in sides:
        if task == "segment" and min(height, width) < 33:
            continue
        images = np.stack([picture(height, width), picture(height, width)[::-1, ::-1]])
        with torch.no_grad():
            expected = tree_leaves(model(torch.cat([evaluated(card, pixels.copy()) for pixels in images])))
        for y, wanted in zip(run(images), expected, strict=True):
            assert y.shape == wanted.shape and (y - wanted).abs().max() <= 1e-5 * wanted.abs().max()
            assert task != "classify" or torch.equal(y.argmax(1), wanted.argmax(1))


def test_of_one_size(tmp_path, monkeypatch, capsys):
    """The command exports a fixed input size, which the metadata of the file states."""
    model, card = made("classify", monkeypatch)
    weights, to = tmp_path / "w.safetensors", tmp_path / "m.pt2"
    save_weights(weights, model.state_dict(), card)
    call = [
        "export",
        "--weights",
        str(weights),
        "--to",
        str(to),
        "--with-preprocessing",
        "--size",
        "32",
        "--batch",
        "1",
    ]
    assert command.main([*call, "--input-size", "48", "70"]) == 0
    assert "images 1 x 48 x 70 x 3" in capsys.readouterr().out
    extra = {"xformer": ""}
    module = torch.export.load(to, extra_files=extra).module()
    said = json.loads(extra["xformer"])
    assert (said["input"], said["preprocessing"], said["image_size"]) == ([1, 48, 70, 3], True, 32)
    assert module(torch.zeros(1, 48, 70, 3, dtype=torch.uint8)).shape == (1, 5)
    with pytest.raises(AssertionError, match="Guard failed"):
        module(torch.zeros(1, 48, 71, 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({}, {"preprocessing": False, "input_size": (8, 9)}, "input-size needs preprocessing in the file"),
        ({}, {"input_size": (8,)}, r"input-size must be dynamic or H W, two numbers above 1, got \(8,\)"),
        ({}, {"input_size": (8, 1)}, "input-size must be dynamic or H W"),
        ({}, {"input_size": ("8", "x")}, "input-size must be dynamic or H W"),
        ({}, {"input_size": "any"}, "input-size must be dynamic or H W.* got any"),
        ({}, {"size": "dynamic"}, "size must be one number where images are resized .* got dynamic"),
        ({}, {"size": (32, 48)}, r"size must be one number where images are resized .* got \(32, 48\)"),
        ({"task": "segment"}, {"input_size": (8, 9)}, "input-size is of models that resize"),
        ({"in_chans": 1}, {}, "images with 3 channels, got a model of 1"),
        ({"crop_pct": 1.1}, {}, "crop_pct must be above 0 and at most 1 in a file, got 1.1"),
        ({"interpolation": "lanczos"}, {}, "interpolation must be bilinear or bicubic in a file, got lanczos"),
    ],
)
def test_what_is_refused(changes, options, said, tmp_path, monkeypatch):
    model, _ = made("classify", monkeypatch)
    card = Card("xformer_xxs", 5, image_size=32, **changes)
    with pytest.raises(UsageError, match=said) as error:
        export(model, card, tmp_path / "m.pt2", **({"preprocessing": True} | options))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
