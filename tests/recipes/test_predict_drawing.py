"""Names and legends in pictures, and errors for model outputs that are not finite."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from scene_cases import OPTIONS

pytest.importorskip("torchvision", reason="torchvision is not installed")

from xformer import __main__ as command
from xformer.recipes import lettering, predict
from xformer.recipes.card import Card
from xformer.recipes.lettering import has_glyph, legible, system_fonts
from xformer.recipes.pictures import colour
from xformer.recipes.tasks import find_task
from xformer.recipes.tasks.detect import draw
from xformer.recipes.tasks.segment import with_legend
from xformer.recipes.weights import build_model

NAMES = [
    "dog", "ein länger\nName", "собака", "σκύλος", "犬", "강아지", "كلب", "כלב", "कुत्ता", "หมา", "chłopiec", "①", "ﬁsh",
    "\uff46\uff55\uff4c\uff4c", "🐕", "👩\u200d🚀", "a\u200db", "\ud800", "\ue000", "\U000e0041", "\x07", "", "  ",
    "犬 dog", "x" * 300, "e\u0301", "\u0345", "\ufffd", "\u202etxt", "\U0001d521\U0001d52c\U0001d524", "ẞ",
]  # fmt: skip


@pytest.fixture(params=["matplotlib", "alone"])
def fonts(request, monkeypatch):
    """Runs a test with the fonts that matplotlib finds, and without matplotlib."""
    caches = (lettering._legible, lettering.system_fonts, lettering.has_glyph)
    for cache in caches:
        cache.cache_clear()
    if request.param == "alone":
        monkeypatch.setitem(sys.modules, "matplotlib.font_manager", None)
    else:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    yield request.param
    for cache in caches:
        cache.cache_clear()


def characters(path):
    """The code points in a font, according to fontTools."""
    tools = pytest.importorskip("fontTools.ttLib", reason="fontTools is not installed")
    if path:
        return set(tools.TTFont(path, fontNumber=0).getBestCmap())
    file = ImageFont.load_default(20).path
    file.seek(0)
    return set(tools.TTFont(io.BytesIO(file.read())).getBestCmap())


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_no_boxes_instead_of_characters(name, fonts):
    text, path = legible(name, 7)
    assert text and len(text) <= 40 and "\n" not in text
    assert {ord(c) for c in text} <= characters(path)
    assert "lastresort" not in path.lower()
    if name.isascii() and name.isprintable() and name.strip():
        assert path == "" and text[:37] == name[:37]


def test_names_by_what_there_is(fonts):
    """A drawn name is the name itself, a simplified form, or the number of the class, as the fonts allow."""
    expected = {
        "dog": "dog", "\uff46\uff55\uff4c\uff4c": "full", "a\u200db": "ab", "": "class 7", "\ud800": "class 7",
        "\x07": "class 7", "\ue000": "class 7", "x" * 41: "x" * 37 + "...",
    }  # fmt: skip
    if fonts == "alone":
        assert system_fonts() == []
        expected |= {"ein länger\nName": "ein langer Name", "Ångström": "Angstrom", "собака": "class 7"}
    else:
        expected |= {name: name for name in ("собака", "σκύλος", "Ångström")}
    assert {name: legible(name, 7)[0] for name in expected} == expected
    fonts_of = {Path(legible(name, 7)[1]).name for name in ("собака", "σκύλος", "Ångström")}
    assert fonts_of == ({""} if fonts == "alone" else {"DejaVuSans.ttf"})


def test_glyphs_of_pillows_own_font():
    """For Pillow's own font, has_glyph compares pixels, and agrees with the character table."""
    there = characters("")
    for number in range(32, 0x2200):
        assert has_glyph("", chr(number)) == (number in there and chr(number).isprintable()), hex(number)


def test_drawn_boxes_have_these_names(fonts):
    """Boxes are drawn with the legible text of a name, pixel for pixel."""

    def pixels(name):
        found = [{"name": name, "index": 7, "score": 0.5, "box": [5, 30, 90, 80]}]
        return np.asarray(draw(Image.new("RGB", (300, 100)), found))

    for name in NAMES:
        text, path = legible(name, 7)
        if path == "":
            assert (pixels(name) == pixels(text)).all()
        assert (pixels(name) != pixels("\u2003")).any() or text == "class 7"


@pytest.mark.parametrize("size", [(1, 1), (37, 1), (1, 500), (640, 480), (2000, 100)], ids=str)
def test_legend(size):
    """The legend is below the unchanged image, and shows the colour and the name of each class."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    before = np.asarray(image).copy()
    classes = [
        (name, i, colour(i)) for i, name in enumerate(["road", "собака", "犬", "a rather long name", *"abcdefgh"])
    ]
    drawn = np.asarray(with_legend(image, classes))
    assert (np.asarray(image) == before).all()
    assert (drawn[: size[1], : size[0]] == before).all()
    strip = drawn[size[1] :]
    assert drawn.shape[1] == size[0] or size[0] < 400
    places = []
    for _, _, fill in classes:
        rows, columns = np.nonzero((strip == fill).all(-1))
        assert len(rows) >= 36  # the colour swatch is within the strip
        places.append((rows.min(), columns.min(), rows.max(), columns.max()))
    assert len(set(places)) == len(classes)
    for top, _, low, right in places:  # letters on white beside each swatch
        beside = strip[top : low + 1, right + 2 : right + 30].sum(-1)
        assert beside.min() < 300 and (beside == 765).any()
    assert (strip[0] == 255).all() and (strip[-1] == 255).all()
    assert with_legend(image, []).size[0] == size[0]


def test_legend_names_classes_that_occur(tmp_path, monkeypatch):
    """The legend names only classes that occur in the picture, and can be turned off."""
    monkeypatch.chdir(tmp_path)
    predictor, _ = predictor_of("segment")
    with torch.no_grad():
        predictor.model.decoder.classifier.weight.zero_()
        predictor.model.decoder.classifier.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    ((_, drawn),) = predictor([Image.new("RGB", (200, 50))])
    strip = np.asarray(drawn)[50:]
    shown = [any((strip == colour(i)).all(-1).flat) for i in range(3)]
    assert shown == [False, True, False]
    predictor.legend = False
    ((_, drawn),) = predictor([Image.new("RGB", (200, 50))])
    assert drawn.size == (200, 50)


def predictor_of(task):
    card = Card("xformer_xxs", 3, task, OPTIONS.get(task, {}), image_size=32, classes=["ant", "bee", "cat"])
    torch.manual_seed(0)
    return find_task(task).predictor(build_model(card).eval(), card, card.classes), card


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("task", ["classify", "segment", "detect"])
def test_outputs_that_are_not_finite(task, value, tmp_path, monkeypatch, capsys):
    """An image with such outputs gets an error and no picture; the other images are not affected."""
    monkeypatch.chdir(tmp_path)
    predictor, card = predictor_of(task)

    def spoil(module, arguments, outputs):
        spoiled = arguments[0].mean((1, 2, 3)) > 0.5
        for of_it in [outputs] if isinstance(outputs, torch.Tensor) else outputs:
            of_it[spoiled, ..., -1] = value

    predictor.model.register_forward_hook(spoil)
    monkeypatch.setattr(predict, "load_model", lambda *_: (predictor.model, card))
    monkeypatch.setattr(predict, "fuse_for_inference", lambda model: model)
    for name, gray in (("a", 0), ("b", 255), ("c", 9)):
        Image.new("RGB", (40, 29), (gray,) * 3).save(f"{name}.jpg")
    assert command.main(["predict", "a.jpg", "b.jpg", "c.jpg", "--weights", "w", "--json", "j.json"]) == 1
    out, err = capsys.readouterr()
    said = f"image: b.jpg: {predict.NOT_FINITE}"
    assert err == f"error: {said}\n" and "nan" not in out and "b.jpg" not in out
    text = Path("j.json").read_text()
    results = json.loads(text)
    assert [result["error"] for result in results] == ["", said, ""]
    assert set(results[1]) == {"image", "error"} and "null" not in text and "NaN" not in text
    if task != "classify":
        assert sorted(path.name for path in Path("predictions").iterdir()) == ["a.png", "c.png"]
