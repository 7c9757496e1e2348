"""Detections in COCO's results format: pycocotools loads them, and they equal those of the plain JSON."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scene_cases import OPTIONS, make_scenes, recipe

pytest.importorskip("torchvision", reason="torchvision is not installed")

from xformer import __main__ as command
from xformer.errors import UsageError
from xformer.recipes.card import Card
from xformer.recipes.data.coco import image_ids
from xformer.recipes.tasks import find_task
from xformer.recipes.weights import build_model, load_weights, save_weights

IDS = [3, 7, 11, 20, 50, 90]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Scenes whose category ids differ from the class indices."""
    folder = make_scenes(tmp_path_factory.mktemp("scenes") / "made")
    for split in ("train2017", "val2017"):
        path = folder / f"coco/annotations/instances_{split}.json"
        content = json.loads(path.read_text())
        numbers = dict(zip(sorted(record["id"] for record in content["categories"]), IDS, strict=True))
        for record in content["categories"]:
            record["id"] = numbers[record["id"]]
        for record in content["annotations"]:
            record["category_id"] = numbers[record["category_id"]]
        path.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def weights(scenes, tmp_path_factory):
    """Weights with the card that the task writes."""
    card = find_task("detect")(recipe("detect", scenes)).card()
    assert (card.class_ids, len(card.classes)) == (IDS, 6)
    torch.manual_seed(0)
    model = build_model(card)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 64, 96))
        for scale in model.scales:
            scale.predict.weight.mul_(60)
            scale.predict.bias.zero_()
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(path, model.state_dict(), card)
    assert load_weights(path)[1].class_ids == IDS
    return path


@pytest.fixture
def call(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments, weights=weights):
        ask = ["predict", *map(str, arguments), "--weights", str(weights), "--json", "j.json", "--out", ""]
        code = command.main(ask)
        return code, capsys.readouterr().err, json.loads(Path("j.json").read_text()) if code < 2 else None

    return run


@pytest.mark.parametrize("renamed", [False, True])
def test_pycocotools_loads_them(renamed, scenes, call, tmp_path):
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    truth = scenes / "coco/annotations/instances_val2017.json"
    content = json.loads(truth.read_text())
    source, options = scenes / "coco/val2017", []
    if renamed:
        truth = tmp_path / "truth.json"
        for record in content["images"]:
            (tmp_path / f"in/{record['id']}").mkdir(parents=True)
            shutil.copy(source / record["file_name"], tmp_path / f"in/{record['id']}/photo.jpg")
            record["file_name"] = f"{record['id']}/photo.jpg"
            record["id"] += 2**40
        content["annotations"] = []
        truth.write_text(json.dumps(content))
        source, options = tmp_path / "in", ["--annotations", truth]
    _, _, plain = call(source)
    code, err, found = call(source, "--json-format", "coco", *options)
    assert (code, err) == (0, "")
    names = {record["id"]: record["file_name"] for record in content["images"]}
    expected = [
        (result["image"], IDS[of_it["index"]], of_it["score"], of_it["box"])
        for result in plain
        for of_it in result["objects"]
    ]
    assert len(expected) > 3 and len(found) == len(expected)
    for row, (image, category, score, (x0, y0, x1, y1)) in zip(found, expected, strict=True):
        assert set(row) == {"image_id", "category_id", "bbox", "score"}
        assert image.endswith(names[row["image_id"]])
        assert (row["category_id"], row["score"]) == (category, score)
        assert row["bbox"] == [x0, y0, x1 - x0, y1 - y0]
    with contextlib.redirect_stdout(io.StringIO()):
        loaded = coco.COCO(str(truth)).loadRes("j.json")
    assert len(loaded.anns) == len(found) and {row["category_id"] for row in loaded.anns.values()} <= set(IDS)


def test_images_with_errors_are_left_out(scenes, call):
    Path("5.jpg").write_bytes(b"no image")
    image = sorted((scenes / "coco/val2017").glob("*.jpg"))[0]
    code, err, found = call("5.jpg", image, "gone.jpg", "--json-format", "coco")
    assert code == 1 and len(err.splitlines()) == 2
    assert {row["image_id"] for row in found} == {int(image.stem)}
    code, _, found = call(image, "--json-format", "coco", "--score", 1.0)
    assert (code, found) == (0, [])


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("000000000139.jpg", 139), ("139.png", 139), ("x/COCO_val2014_000000000139.jpg", 139), ("0.jpg", 0),
        ("a139.jpg", None), ("139 (1).jpg", None), ("-1.jpg", None), ("1.5.jpg", None), ("٣.jpg", None),
        ("9" * 19 + ".jpg", None), (".jpg", None),
    ],
)  # fmt: skip
def test_numbers_in_names(name, number):
    if number is None:
        with pytest.raises(UsageError) as error:
            image_ids([name])
        assert str(error.value) == (
            "json-format: coco needs the number of each image: name it as in 000000000139.jpg, or give a file of "
            f"COCO's JSON with --annotations; got {name}"
        )
    else:
        assert image_ids([name]) == {name: number}


def test_file_names_of_annotations(tmp_path, monkeypatch):
    """An image matches the longest file_name that its path ends with, in whole path components."""
    monkeypatch.chdir(tmp_path)  # the name of the folder is part of the paths
    path = tmp_path / "t.json"
    names = {5: "a.jpg", 6: "x/a.jpg", 7: "./y/b.jpg", 8: "ü.jpg"}
    path.write_text(json.dumps({"images": [{"id": number, "file_name": name} for number, name in names.items()]}))
    images = ["a.jpg", "x/a.jpg", "z/y/b.jpg", str(tmp_path / "ü.jpg")]
    assert image_ids(images, path) == dict(zip(images, (5, 6, 7, 8), strict=True))
    for image in ("ba.jpg", "b.jpg", "5.jpg"):
        with pytest.raises(UsageError) as error:
            image_ids([image], path)
        assert str(error.value) == f"annotations: {path} must have all images by their file_name, got {image}"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read"),
        ("no json", "is not JSON"),
        ("[]", "must hold a list 'images'"),
        ('{"images": [{"id": 1}]}', "image 1 has no file_name"),
        ('{"images": [{"id": "1", "file_name": "5.jpg"}]}', "must be a record with an id"),
        (
            '{"images": [{"id": 1, "file_name": "5.jpg"}, {"id": 2, "file_name": "5.jpg"}]}',
            "images 1 and 2 have the same",
        ),
    ],
)
def test_annotations_that_are_none(content, said, call):
    Path("5.jpg").write_bytes(b"")
    if content is not None:
        Path("t.json").write_text(content)
    code, err, _ = call("5.jpg", "--json-format", "coco", "--annotations", "t.json")
    assert code == 2 and err.startswith("error: annotations: ") and said in err and len(err.splitlines()) == 1


def test_mistakes(call, tmp_path, weights, capsys):
    for name in ("5.jpg", "b/5.png", "dog.jpg"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"")
    for arguments, said in (
        (("5.jpg", "--json-format", "voc"), "json-format must be plain or coco, got 'voc'"),
        (("5.jpg", "--annotations", "t"), "annotations needs --json-format coco, got 't' with plain"),
        (("5.jpg", "dog.jpg", "--json-format", "coco"), "json-format: coco needs the number of each image: name it as"),
        (("5.jpg", "b/5.png", "--json-format", "coco"), "json-format: 5.jpg and b/5.png would both be COCO's image 5"),
    ):
        code, err, _ = call(*arguments)
        assert code == 2 and err.startswith(f"error: {said}") and len(err.splitlines()) == 1, err
    assert command.main(["predict", "5.jpg", "--weights", str(weights), "--json-format", "coco"]) == 2
    assert capsys.readouterr().err == "error: json-format needs --json FILE, got 'coco' without it\n"
    Path("t.json").write_text('{"images": [{"id": 1, "file_name": "5.jpg"}]}')
    ask = ["predict", "5.jpg", "--weights", str(weights), "--json-format", "coco", "--annotations", "t.json"]
    assert command.main([*ask, "--json", "t.json"]) == 2
    assert capsys.readouterr().err == "error: json: it would replace t.json: name another file\n"


def test_weights_without_ids(call, weights, tmp_path):
    """Weights without ids (earlier versions) or with a wrong number of ids give an error."""
    state, card = load_weights(weights)
    Path("5.jpg").write_bytes(b"")
    for ids, said in (
        ([], "json-format: coco needs weights that say the ids of COCO's categories, as train writes them"),
        ([1, 2], "weights: the card of old.safetensors: there are 2 class_ids of 6 classes"),
    ):
        save_weights("old.safetensors", state, replace(card, class_ids=ids))
        code, err, _ = call("5.jpg", "--json-format", "coco", weights="old.safetensors")
        assert (code, err) == (2, f"error: {said}\n")
    assert Card("xformer_xxs", 6, "detect", OPTIONS["detect"]).class_ids == []
