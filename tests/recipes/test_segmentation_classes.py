"""Segmentation with classes that a file defines."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from eval_cases import evaluated, refused, write
from PIL import Image
from scene_cases import make_scenes
from scene_cases import recipe as scene_recipe

from xformer import __main__ as command
from xformer.errors import UsageError
from xformer.recipes.tasks import find_task
from xformer.recipes.weights import load_weights


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes") / "made")


@pytest.fixture
def own_scenes(scenes, tmp_path):
    """The scenes with labels of three classes (5, 200 and 9) and 0 for no class."""
    shutil.copytree(scenes / "cityscapes", tmp_path / "own")
    for path in (tmp_path / "own").rglob("*_labelIds.png"):
        labels = np.asarray(Image.open(path))
        numbers = np.unique(labels)
        own = np.zeros_like(labels)
        for number, other in zip(numbers, (5, 200, 9, 0, 0, 0, 0, 0, 0, 0), strict=False):
            own[labels == number] = other
        Image.fromarray(own).save(path)
    return tmp_path / "own"


CSV = "id, name, blue, red, green\n5,floor,30,10,20\n200,a wall,60,40,50\n9,Tür,90,70,80\n"


def own_recipe(root, out, classes, **changes):
    return scene_recipe("segment", root, out, data=str(root), classes=str(classes), epochs=1, **changes)


def test_segmentation_of_own_classes(own_scenes, tmp_path, monkeypatch):
    """The file defines names, ids and colours. The card stores them, so that later commands do not need the file."""
    from xformer.recipes.train import train

    monkeypatch.chdir(tmp_path)
    (tmp_path / "classes.csv").write_text(CSV, "utf-8")
    train(own_recipe(own_scenes, tmp_path / "out", tmp_path / "classes.csv"))
    weights = tmp_path / "out/last.safetensors"
    _, card = load_weights(weights)
    assert (card.classes, card.class_ids, card.num_classes) == (["floor", "a wall", "Tür"], [5, 200, 9], 3)
    colours = [(10, 20, 30), (40, 50, 60), (70, 80, 90)]
    assert [tuple(colour) for colour in card.colours] == colours
    result, _ = evaluated(weights, own_scenes)
    assert result["miou"] > 0
    data = find_task("segment")(own_recipe(own_scenes, "unused", ""), weights=card).data
    _, y = next(data.evaluate())
    path = sorted((own_scenes / "gtFine/val").rglob("*_labelIds.png"))[0]
    labels = torch.from_numpy(np.asarray(Image.open(path)).astype(int))
    for index, number in enumerate(card.class_ids):
        assert torch.equal(y[0] == index, labels == number)
    assert torch.equal(y[0] == 255, labels == 0)

    image = next((own_scenes / "leftImg8bit/val").rglob("*.png"))
    assert command.main(["predict", str(image), "--weights", str(weights), "--no-legend", "--json", "j"]) == 0
    (said,) = json.loads((tmp_path / "j").read_text())
    picture, before = (np.asarray(Image.open(p).convert("RGB")).astype(int) for p in (said["picture"], image))
    distance = [abs(picture - (before + colour) / 2).max(-1) for colour in np.array(colours)]
    assert (np.min(distance, 0) <= 1).all()


def test_names_alone_are_ids_in_their_order(own_scenes, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    data = find_task("segment")(own_recipe(own_scenes, "unused", tmp_path / "names.txt")).data
    assert data.labels.ids == list(range(10)) and data.labels.colours == []


@pytest.mark.parametrize(("text", "said"), [
    ("name,id\na,5\na,6\n", "has the name a twice"),
    ("name,id\na,5\nb,5\n", "has the id 5 twice"),
    ("name,id\na,256\n", "line 2 of .*: id must be an integer from 0 to 255, got '256'"),
    ("name,id\na,-1\n", "id must be an integer from 0 to 255, got '-1'"),
    ("name,id\na\n", "id must be an integer from 0 to 255, got ''"),
    ("name,id\n,4\n", "line 2 of .* has no name"),
    ("name,id,red,green,blue\na,4,1,2,300\n", "blue must be an integer from 0 to 255, got '300'"),
    ("name,id\n", "must name from 1 to 255 classes, got 0"),
    ("name,id\na,77\n", "no pixel has a class .*: their numbers are 0, 5, 9, 200, and those of the classes 77"),
])  # fmt: skip
def test_files_of_classes_that_are_none(text, said, own_scenes, tmp_path):
    (tmp_path / "classes.csv").write_text(text)
    with pytest.raises(UsageError, match=said) as caught:
        find_task("segment")(own_recipe(own_scenes, "unused", tmp_path / "classes.csv"))
    assert "\n" not in str(caught.value)


def test_weights_of_other_classes_of_pixels(own_scenes, scenes, tmp_path):
    card = find_task("segment")(scene_recipe("segment", scenes)).card()
    path = write(tmp_path / "w.safetensors", card)
    (tmp_path / "classes.csv").write_text(CSV)
    refused("has 19 classes, and .* has 3", path, own_scenes, classes=str(tmp_path / "classes.csv"))
