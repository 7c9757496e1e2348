"""Scenes of shapes: files as COCO and Cityscapes have them, and labels that are true."""

import hashlib
import json
import sys

import numpy as np
import pytest
from PIL import Image

from experiments import shapes
from xformer import __main__ as command
from xformer.errors import UsageError

SIZE = (96, 128)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "made"
    shapes.make_shapes(folder, images=60, held_out=8, size=SIZE, seed=1)
    return folder


@pytest.fixture(scope="module")
def coco(root):
    coco = pytest.importorskip("pycocotools.coco", reason="COCO's own reader is not installed")
    return coco.COCO(root / "coco" / "annotations" / "instances_train2017.json")


def test_coco_reads_it(root, coco):
    assert len(coco.imgs) == 60 and {cat["name"] for cat in coco.cats.values()} == {k.name for k in shapes.KINDS}
    assert {a["category_id"] for a in coco.anns.values()} <= set(coco.cats)
    for image in coco.imgs.values():
        with Image.open(root / "coco" / "train2017" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) == SIZE[::-1]
    counts = [len(coco.getAnnIds(i)) for i in coco.imgs]
    assert 0 in counts and max(counts) >= 5
    assert any(a["iscrowd"] for a in coco.anns.values())


def test_outlines_boxes_and_labels_agree(root, coco):
    """A polygon covers the pixels that Cityscapes' labels have for its class, and its box is around them."""
    label = {kind.category: kind.label for kind in shapes.KINDS}
    folder = root / "cityscapes" / "gtFine" / "train" / "shapes"
    for annotation in coco.anns.values():
        labels = np.asarray(Image.open(folder / f"shapes_{annotation['image_id']:06d}_000019_gtFine_labelIds.png"))
        mask = coco.annToMask(annotation).astype(bool)
        x, y, width, height = map(int, annotation["bbox"])
        box = np.zeros_like(mask)
        box[y : y + height, x : x + width] = True
        right = labels == label[annotation["category_id"]]
        if annotation["iscrowd"]:
            assert mask.sum() == annotation["area"] and right[mask].all() and box[mask].all()
        else:  # COCO's and Pillow's pixels of a polygon differ along its rim
            assert (right & mask & box).sum() >= 0.8 * mask.sum()
            assert abs(mask.sum() - annotation["area"]) <= 0.25 * annotation["area"] + 20


def test_cityscapes_names_and_labels(root):
    for split, count in (("train", 60), ("val", 8)):
        images = sorted((root / "cityscapes" / "leftImg8bit" / split / "shapes").iterdir())
        labels = sorted((root / "cityscapes" / "gtFine" / split / "shapes").iterdir())
        assert len(images) == len(labels) == count
        for image, of_it in zip(images, labels, strict=True):
            assert image.name.replace("_leftImg8bit", "_gtFine_labelIds") == of_it.name
            ids = np.asarray(Image.open(of_it))
            assert ids.shape == SIZE and ids.dtype == np.uint8
            assert set(np.unique(ids)) <= {kind.label for kind in shapes.KINDS} | {
                shapes.SKY, shapes.ROAD, shapes.BUILDING, shapes.EGO,
            }  # fmt: skip


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


def test_a_seed_is_a_data_set(tmp_path):
    for name, seed, held_out in (("a", 0, 2), ("b", 0, 3), ("c", 5, 2)):
        shapes.make_shapes(tmp_path / name, images=3, held_out=held_out, size=(64, 64), seed=seed)
    a, b, c = (dict(digest(tmp_path / name)) for name in "abc")
    shared = [path for path in a if "val2017.json" not in path.name]
    assert all(a[path] == b[path] for path in shared)  # more held-out scenes change nothing else
    assert a != c
    said = json.loads((tmp_path / "a" / "coco" / "annotations" / "instances_val2017.json").read_text())
    assert len(said["images"]) == 2
    pictures = [hash_ for path, hash_ in a.items() if path.suffix == ".jpg"]
    assert len(set(pictures)) == len(pictures) == 5


@pytest.mark.parametrize("pixels", [[], [0], [11], [0, 1], [3, 5, 7], [10, 11]])
def test_run_lengths(pixels):
    mask = np.zeros((3, 4), bool)
    mask.T.reshape(-1)[pixels] = True  # a view: column by column
    said = shapes.run_lengths(mask)
    assert said["size"] == [3, 4] and sum(said["counts"]) == 12
    values = np.arange(len(said["counts"])) % 2 == 1
    assert (mask == np.repeat(values, said["counts"]).reshape(4, 3).T).all()


def test_what_is_refused(root, tmp_path):
    for arguments, message in (
        ({"folder": root}, "holds coco or cityscapes already"),
        ({"folder": tmp_path, "images": 0}, "images and held-out must be 1 or more, got 0"),
        ({"folder": tmp_path, "size": (64, 32)}, "size must be 64 or more"),
    ):
        with pytest.raises(UsageError, match=message):
            shapes.make_shapes(**arguments)


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    call = ["make-shapes", "~/made", "--images", "2", "--held-out", "1", "--size", "64", "64"]
    assert command.main([*call, "--seed", "-1"]) == 2
    assert capsys.readouterr().err == "error: seed must be 0 or more, got -1\n" and not list(tmp_path.iterdir())
    assert command.main(call) == 0
    assert capsys.readouterr().err == ""  # no terminal
    assert len(list((tmp_path / "made" / "coco" / "train2017").iterdir())) == 2


def test_command_outside_of_a_clone(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "experiments.shapes", None)
    assert command.main(["make-shapes", "made"]) == 2
    said = "it is not installed, use python -m xformer in a clone of the repository"
    assert capsys.readouterr().err == f"error: make-shapes needs the package experiments.shapes: {said}\n"


def test_progress_on_a_terminal(tmp_path, capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    call = ["make-shapes", str(tmp_path / "made"), "--images", "2", "--held-out", "1", "--size", "64", "64"]
    assert command.main(call) == 0
    said = capsys.readouterr().err
    assert "train" in said and "val" in said and "100%" in said
