"""Objects and segments of predict equal those of the evaluation, in pixels of the file, and are drawn in place."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scene_cases import LAYOUTS, OPTIONS, make_scenes, recipe

pytest.importorskip("torchvision", reason="torchvision is not installed")

from xformer import __main__ as command
from xformer import fuse_for_inference
from xformer.recipes.card import Card
from xformer.recipes.data.detection import CocoData, restore
from xformer.recipes.data.order import Replica
from xformer.recipes.data.segmentation import CLASSES, COLOURS, CityscapesData
from xformer.recipes.pictures import colour
from xformer.recipes.weights import build_model, save_weights

TASKS = tuple(LAYOUTS)
NAMES = {"detect": ["disc", "square", "triangle", "star", "cross", "arrow"], "segment": list(CLASSES)}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes") / "made")


def card(task, **changes):
    return replace(
        Card("xformer_xxs", len(NAMES[task]), task, OPTIONS[task], image_size=64, classes=NAMES[task]), **changes
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By task: a model with non-trivial outputs, fused as in the evaluation, and its file."""
    found = {}
    for task in TASKS:
        torch.manual_seed(0)
        model = build_model(card(task))
        with torch.no_grad():
            for _ in range(3):
                model(torch.randn(4, 3, 64, 96))
            heads = [scale.predict for scale in model.scales] if task == "detect" else [model.decoder.classifier]
            for head in heads:
                head.weight.mul_(60)
                head.bias.zero_()
        path = tmp_path_factory.mktemp("weights") / f"{task}.safetensors"
        save_weights(path, model.state_dict(), card(task))
        found[task] = (fuse_for_inference(model.eval()), path)
    return found


@pytest.fixture
def call(models, tmp_path, capsys, monkeypatch):
    """Runs the command in a separate folder: exit code, stdout, stderr and JSON."""
    monkeypatch.chdir(tmp_path)

    def run(task, *arguments):
        code = command.main(["predict", *map(str, arguments), "--weights", str(models[task][1]), "--json", "j.json"])
        out, err = capsys.readouterr()
        return code, out, err, json.loads((tmp_path / "j.json").read_text()) if code < 2 else None

    return run


def files_of(scenes, task):
    pattern = {"detect": "coco/val2017/*.jpg", "segment": "cityscapes/leftImg8bit/val/*/*.png"}[task]
    return sorted(scenes.glob(pattern))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_boxes_are_those_of_the_evaluation(scenes, models, call, tmp_path):
    """Boxes equal those of the evaluation, in pixels of the files, for several images per batch."""
    images = files_of(scenes, "detect")
    code, out, err, results = call("detect", *images, "--score", 0.3, "--iou", 0.6, "--batch-size", 2)
    assert (code, err) == (0, "")
    model, _ = models["detect"]
    for x, targets in CocoData(recipe("detect", scenes, batch_size=1), Replica()).evaluate():
        (target,) = targets
        with torch.no_grad():
            (expected,) = model.detect(model(x), score=0.3, iou=0.6, sizes=[target["size"]])
        assert len(expected["boxes"]) > 1
        (result,) = (r for r in results if int(r["image"][-16:-4]) == target["image_id"])
        assert (result["error"], result["width"], result["height"]) == ("", 96, 64)
        objects = result["objects"]
        assert [of_it["index"] for of_it in objects] == expected["labels"].tolist()
        assert [of_it["name"] for of_it in objects] == [NAMES["detect"][i] for i in expected["labels"]]
        for key, wanted in (("score", expected["scores"]), ("box", restore(expected["boxes"], target))):
            got = torch.tensor([of_it[key] for of_it in objects])
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
        first = objects[0]
        line = [f"{first['score']:.2%}", first["name"], *(f"{side:.0f}" for side in first["box"])]
        title = f"{result['image']} -> {result['picture']}"
        assert out.split(title + "\n")[1].splitlines()[0].split() == line
    assert [result["image"] for result in results] == list(map(str, images))
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == [f"{p.stem}.png" for p in images]


def test_boxes_are_drawn_where_they_are(scenes, call):
    """Boxes are drawn in the colour of their class, on the otherwise unchanged image."""
    image = files_of(scenes, "detect")[1]
    _, _, _, ((result),) = call("detect", image, "--score", 0.3)
    drawn, before = pixels(result["picture"]), pixels(image)
    assert drawn.shape == before.shape
    best = result["objects"][0]
    x0, _, x1, y1 = (round(side) for side in best["box"])
    low = (drawn[min(y1, 63) - 1 : y1 + 1, (x0 + x1) // 2] == colour(best["index"])).all(-1)
    assert low.any()
    _, _, _, ((result),) = call("detect", image, "--score", 1.0)
    assert result["objects"] == [] and (pixels(result["picture"]) == before).all()


def test_drawn_names_stay_in_the_image():
    """Any name can be drawn in an image of any size, without changing its size."""
    from xformer.recipes.tasks.detect import draw

    for size in ((1, 1), (12, 300), (640, 480)):
        image = Image.new("RGB", size)
        objects = [{"name": "ein länger\nName", "index": i, "score": 0.5, "box": [0, 0, *size]} for i in range(9)]
        assert draw(image, objects).size == size
    big, small = (draw(Image.new("RGB", s), [objects[0] | {"box": [0, 30, 9, 40]}]) for s in ((2000, 1000), (200, 100)))
    lettered = [(np.asarray(image).any(-1)).any(1).sum() for image in (big, small)]
    assert lettered[0] > 2 * lettered[1]
    assert len({colour(i) for i in range(80)}) == 80


@pytest.mark.parametrize("windows", [(), ("--window", 48, 64, "--stride", 32, 32), ("--window", 40, 40)], ids=str)
def test_segments_are_those_of_the_evaluation(scenes, models, call, windows):
    images = files_of(scenes, "segment")
    code, out, err, results = call("segment", *images, *windows)
    assert (code, err) == (0, "")
    model, _ = models["segment"]
    palette = np.array(COLOURS)
    for (x, _), image, result in zip(
        CityscapesData(recipe("segment", scenes, batch_size=1), Replica()).evaluate(), images, results, strict=True
    ):
        if windows:
            stride = (32, 32) if "--stride" in windows else (30, 30)
            logits = model.sliding_window(x, windows[1:3], stride)
        else:
            logits = model.whole_image(x)
        classes = logits[0].argmax(0)
        assert len(classes.unique()) > 2
        assert [of_it["name"] for of_it in result["classes"]] == list(CLASSES)
        assert [of_it["index"] for of_it in result["classes"]] == list(range(19))
        shares = torch.tensor([of_it["share"] for of_it in result["classes"]])
        assert torch.equal(shares, torch.bincount(classes.flatten(), minlength=19) / classes.numel())
        blended = (pixels(image) + palette[classes.numpy()]) / 2
        drawn = pixels(result["picture"])
        assert (abs(drawn[:64, :96] - blended) <= 1).all() and len(drawn) > 64 and drawn.shape[1] >= 96
        there = sorted((of_it for of_it in result["classes"] if of_it["share"]), key=lambda of_it: -of_it["share"])
        lines = out.split(f"{image} -> {result['picture']}\n")[1].splitlines()
        assert lines[0] == f"  {there[0]['share']:7.2%}  {there[0]['name']}" and len(lines) >= len(there)


def test_colours_are_those_of_the_official_scripts():
    labels = pytest.importorskip("cityscapesscripts.helpers.labels", reason="the official scripts are not installed")
    assert list(COLOURS) == [label.color for name in CLASSES for label in labels.labels if label.name == name]


def test_other_classes_have_colours_too(tmp_path, monkeypatch):
    """Known class names keep their official colours, also if a labels file renames them."""
    monkeypatch.chdir(tmp_path)
    other = card("segment", num_classes=3, classes=["cake", "car", "cup"])
    model = build_model(other)
    with torch.no_grad():
        model.decoder.classifier.weight.zero_()
        model.decoder.classifier.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    save_weights(tmp_path / "w.safetensors", model.state_dict(), other)
    (tmp_path / "names").write_text("Kuchen\nAuto\nTasse\n")
    Image.new("RGB", (37, 1), (100, 200, 40)).save("a.png")
    ask = ["predict", "a.png", "--weights", "w.safetensors", "--labels", "names", "--json", "j"]
    assert command.main([*ask, "--no-legend"]) == 0
    (result,) = json.loads((tmp_path / "j").read_text())
    assert [(of_it["name"], of_it["share"]) for of_it in result["classes"]] == [
        ("Kuchen", 0),
        ("Auto", 1),
        ("Tasse", 0),
    ]
    drawn = pixels("predictions/a.png")
    assert drawn.shape == (1, 37, 3) and (abs(drawn - (50, 100, 91)) <= 1).all()


@pytest.mark.parametrize("task", TASKS)
def test_images_that_cannot_be_read(task, scenes, call, tmp_path):
    """Unreadable images give one error each. The EXIF orientation of others is applied and reported."""
    good = files_of(scenes, task)[0]
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(good) as image:
        image.convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    good = shutil.copy(good, tmp_path / f"good{good.suffix}")
    code, out, err, results = call(task, "gone.png", "bad.jpg", good, "turned.jpg", "--out", "deep/folder")
    assert code == 1 and f"{tmp_path}/good{good.suffix} -> deep/folder/good.png" in out
    missing, corrupt = err.splitlines()
    assert missing == "error: image: there is no file gone.png"
    assert corrupt.startswith("error: image: bad.jpg cannot be read: ")
    assert [bool(result["error"]) for result in results] == [True, True, False, False]
    assert (results[3]["width"], results[3]["height"]) == (64, 96)
    assert ["exif_orientation" in result for result in results] == [False, False, False, True]
    assert results[3]["exif_orientation"] == 6
    assert sorted(path.name for path in (tmp_path / "deep/folder").iterdir()) == ["good.png", "turned.png"]
    drawn = pixels("deep/folder/turned.png")
    assert drawn.shape == (96, 64, 3) if task == "detect" else len(drawn) > 96 and drawn.shape[1] >= 64
    _, out, _, results = call(task, good, "--out", "")
    assert out.splitlines()[1] == str(good) and "picture" not in results[0]
    assert not (tmp_path / "predictions").exists()


def test_files_are_not_written_over_others(scenes, call, tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("a.png", "b/a.jpg", "c.jpg"):
        Image.new("RGB", (40, 30), (9, 99, 200)).save(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path)
    for folder, target in (("links", "a.png"), ("dangling", "gone.png")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").symlink_to(tmp_path / target)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/b").write_text("a file")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for arguments, said in (
        (("a.png", "--out", "."), "out: the picture of a.png would replace a.png: name another folder"),
        (("a.png", "--out", "link"), "out: the picture of a.png would replace link/a.png: name another folder"),
        (("c.jpg", "a.png", "--out", "b/.."), "out: the picture of a.png would replace b/../a.png: name another"),
        (("c.jpg", "--out", "c.jpg"), "out: there can be no folder c.jpg"),
        (("b/a.jpg", "--out", "."), "out: a.png is there and was not written by predict: remove it or name another"),
        (("b/a.jpg", "--out", "links"), "out: links/a.png is there and was not written by predict: remove it"),
        (("b/a.jpg", "--out", "dangling"), "out: dangling/a.png is there and was not written by predict: remove it"),
        (("a.png", "b", "--out", "taken"), "out: there can be no folder taken/b"),
    ):
        code, out, err, _ = call("detect", *arguments)
        assert (code, out) == (2, "") and err.startswith(f"error: {said}"), err
        assert len(err.splitlines()) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("task", "arguments", "said"),
    [
        ("detect", ("--top", 3), "top means nothing to task detect, got 3"),
        ("detect", ("--window", 3, 4), "window means nothing to task detect, got [3, 4]"),
        ("segment", ("--score", 0.5), "score means nothing to task segment, got 0.5"),
        ("segment", ("--batch-size", 2), "batch-size means nothing to task segment, got 2"),
        ("detect", ("--score", 1.5), "score must be from 0 to 1, got 1.5"),
        ("detect", ("--iou", "nan"), "iou must be from 0 to 1, got nan"),
        ("detect", ("--batch-size", 0), "batch-size must be 1 or more, got 0"),
        ("detect", ("--legend",), "legend means nothing to task detect, got True"),
        ("detect", ("--no-legend",), "legend means nothing to task detect, got False"),
        ("segment", ("--json-format", "coco"), "json-format means nothing to task segment, got 'coco'"),
        ("segment", ("--annotations", "x"), "annotations means nothing to task segment, got 'x'"),
        ("segment", ("--stride", 9, 9), "stride needs a window, got stride=(9, 9) alone"),
        ("segment", ("--window", 0, 9), "stride must be from 1 to the window's side, got stride=(1, 6) for window="),
        ("segment", ("--window", 8, 9, "--stride", 9, 9), "stride must be from 1 to the window's side, got stride=(9"),
    ],
)
def test_mistakes(task, arguments, said, call):
    code, out, err, _ = call(task, "a.png", *arguments)
    assert (code, out) == (2, "") and err.startswith(f"error: {said}") and len(err.splitlines()) == 1
