"""Training on data in COCO's format: boxes, crops, metrics, and runs of a few steps."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torchvision", reason="torchvision is not installed")

from experiments.shapes import KINDS, make_shapes
from xformer.errors import UsageError
from xformer.recipes.data import detection as coco
from xformer.recipes.data.loader import Batch
from xformer.recipes.data.order import Replica
from xformer.recipes.settings import load_recipe
from xformer.recipes.tasks.detect import MeanAP
from xformer.recipes.train import train
from xformer.registry import MEAN, STD

ANCHORS = [[6, 6], [8, 8], [10, 10], [12, 12], [14, 14], [16, 16], [20, 20], [24, 24], [30, 30]]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Scenes. The first evaluation scene has no boxes, the second has a crowd and another box."""
    folder = tmp_path_factory.mktemp("scenes") / "made"
    make_shapes(folder, images=8, held_out=4, size=(64, 96))
    path = annotation_file(folder / "coco", "val")
    said = json.loads(path.read_text())
    said["annotations"] = [a for a in said["annotations"] if a["image_id"] > 2]
    for number, box in ((900, [3.0, 5.0, 40.0, 30.0]), (901, [60.0, 20.0, 20.0, 25.0])):
        said["annotations"].append(record(number, box, 2, iscrowd=int(number == 900)))
    path.write_text(json.dumps(said))
    return folder / "coco"


def annotation_file(root, split):
    return root / "annotations" / f"instances_{split}2017.json"


def record(number, box, image, **more):
    area = box[2] * box[3]
    return {"id": number, "image_id": image, "category_id": 3, "bbox": box, "area": area, "iscrowd": 0} | more


def recipe(root, out="unused", **changes):
    settings = {
        "task": "detect", "data": str(root), "out": str(out), "image_size": 64, "batch_size": 4, "epochs": 2,
        "scale": [0.75, 1.5], "workers": 0, "threads": 1, "tensorboard": False, "log_every": 1, "lr": 1e-3,
        "model_options": {"widths": [16, 16, 16], "anchors": ANCHORS, "zero_init_last": False},
        "warmup_epochs": 0.0, "color_jitter": 0.2,
    }  # fmt: skip
    return load_recipe("", settings | changes)


def held_out(root):
    return coco.open_coco(root)[1]


def score(pictures, change=lambda boxes: boxes, crowds=False, items=None):
    """Metrics of predictions that are the ground truth, with boxes modified by `change`."""
    metric = MeanAP(pictures.annotations)
    for item in items or range(len(pictures)):
        _, target = pictures.read(item)
        keep = target["iscrowd"] | True if crowds else ~target["iscrowd"]
        boxes, labels = target["boxes"][keep], target["labels"][keep]
        metric.add(target["image_id"], change(boxes), torch.linspace(0.9, 0.5, len(boxes)), labels)
    return metric.compute()


def test_categories_with_gaps_are_numbered_in_order(root):
    annotations = held_out(root).annotations
    assert annotations.categories == {kind.category: kind.name for kind in KINDS}
    said = json.loads(annotation_file(root, "val").read_text())
    numbers = sorted(kind.category for kind in KINDS)
    for item, image in enumerate(annotations.ids):
        expected = [a for a in said["annotations"] if a["image_id"] == image]
        of_it = slice(annotations.bounds[item], annotations.bounds[item + 1])
        assert [numbers[label] for label in annotations.labels[of_it]] == [a["category_id"] for a in expected]
        for box, a in zip(annotations.boxes[of_it].tolist(), expected, strict=True):
            x, y, w, h = a["bbox"]
            assert box == pytest.approx([x, y, x + w, y + h])


def test_perfect_predictions_are_all_right_and_shifted_ones_less(root):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    pictures = held_out(root)
    perfect, shifted, far = (score(pictures, lambda boxes, by=by: boxes + by) for by in (0, 1.5, 200))
    assert perfect == {"map": pytest.approx(100), "map50": pytest.approx(100)}
    assert 0 < shifted["map"] < 90 and shifted["map"] < shifted["map50"]
    assert far == {"map": 0, "map50": 0}
    assert score(pictures, lambda boxes: boxes[:0] if len(boxes) else boxes, items=[0]) == {"map": 0, "map50": 0}


def test_detections_in_crowds_are_neither_right_nor_wrong(root):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    pictures = held_out(root)
    assert score(pictures, crowds=True, items=[1])["map"] == pytest.approx(100)
    _, target = pictures.read(1)
    assert target["iscrowd"].tolist() == [True, False]
    wrong = torch.tensor([[5.0, 45.0, 20.0, 60.0]])
    metric = MeanAP(pictures.annotations)
    boxes = torch.cat((wrong, target["boxes"][~target["iscrowd"]]))
    metric.add(target["image_id"], boxes, torch.tensor([0.9, 0.8]), target["labels"])
    assert metric.compute()["map"] == pytest.approx(50)


def test_metrics_are_over_all_processes(root, monkeypatch):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    from xformer.recipes.tasks import detect

    pictures = held_out(root)
    *shares, whole = (MeanAP(pictures.annotations) for _ in range(3))
    for item in range(len(pictures)):
        _, target = pictures.read(item)
        keep = ~target["iscrowd"]
        boxes, labels = target["boxes"][keep] + item, target["labels"][keep]
        for metric in (shares[item % 2], whole):
            metric.add(target["image_id"], boxes, torch.full((len(boxes),), 0.5), labels)
    expected = whole.compute()

    def gather(parts, own):
        assert own is shares[1].found
        parts[:] = [share.found for share in shares]

    monkeypatch.setattr(detect.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(detect.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(detect.dist, "all_gather_object", gather)
    assert shares[1].compute() == expected and 0 < expected["map"] < 100


def test_metrics_see_raw_maps_in_the_pixels_of_the_file(root):
    """A box encoded in raw maps is found at its place in the file, for any input size of the model."""
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    from xformer.detection.boxes import STRIDES, encode, grid, to_cxcywh

    pictures = held_out(root)
    image, target = pictures.read(1)
    target = target | {key: target[key][1:] for key in ("boxes", "labels", "iscrowd")}
    _, seen = coco.letterbox(image, target, 160)
    maps = [torch.full((1, 3 * 11, 160 // s, 160 // s), -20.0) for s in STRIDES]
    where = grid(maps, ANCHORS)
    centred = to_cxcywh(seen["boxes"])
    column, row = (centred[0, :2] / 32).long().tolist()
    last = sum((160 // s) ** 2 * 3 for s in (8, 16)) + (row * 5 + column) * 3
    raw = encode(centred, where.take(torch.tensor([last])))[0]
    maps[2][0, :4, row, column] = raw
    maps[2][0, [4, 5 + int(seen["labels"][0])], row, column] = 20.0
    metric = MeanAP(pictures.annotations, ANCHORS)
    metric.update(maps, [seen])
    assert metric.compute()["map"] == pytest.approx(100)
    (found,) = metric.found[target["image_id"]]
    assert found["bbox"] == pytest.approx([60, 20, 20, 25], abs=0.01)


def test_evaluation_images_are_whole_and_come_once(root):
    batches = [b for rank in range(2) for b in coco.CocoData(recipe(root), Replica(rank, 2)).evaluate()]
    targets = [target for _, of_batch in batches for target in of_batch]
    assert sorted(target["image_id"] for target in targets) == [1, 2, 3, 4]
    pictures = held_out(root)
    for x, of_batch in batches:
        assert x.shape[1:] == (3, 64, 64) and (x[:, :, 43:] == 0).all() and (x[:, :, :43] != 0).any()
        for target in of_batch:
            assert (target["size"], target["original"]) == ((43, 64), (64, 96))
            _, whole = pictures.read(target["image_id"] - 1)
            assert torch.allclose(coco.restore(target["boxes"], target), whole["boxes"], atol=1e-4)
    assert any(not len(target["boxes"]) for target in targets)


@pytest.mark.parametrize(("height", "width"), [(7, 301), (333, 50), (64, 64), (1, 1)])
def test_letterbox_has_an_inverse(height, width):
    boxes = torch.rand(20, 4) * torch.tensor([width, height] * 2)
    image = Image.new("RGB", (width, height), (255, 0, 0))
    x, target = coco.letterbox(image, {"boxes": boxes}, 96)
    assert x.shape == (3, 96, 96) and max(target["size"]) == 96
    assert torch.allclose(coco.restore(target["boxes"], target), boxes, rtol=1e-5, atol=1e-4)
    rows, columns = target["size"]
    assert (x[0, :rows, :columns] > 1).all() and (x[:, rows:] == 0).all() and (x[:, :, columns:] == 0).all()


COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))


@pytest.mark.parametrize("size", [64, 160])
def test_training_boxes_stay_on_their_objects(size):
    """Boxes of crops match the colours of their objects. Only objects that are mostly cut off lose their box."""
    boxes = torch.tensor([[10.0, 10, 60, 40], [70, 20, 110, 90], [5, 60, 45, 95], [100, 95, 140, 119]])
    image = Image.new("RGB", (150, 120))
    for box, colour in zip(boxes.int().tolist(), COLOURS, strict=True):
        image.paste(colour, tuple(box))
    prepare = coco.DetectTransform(load_recipe("", {"scale": [0.5, 2.5], "hflip": 0.5, "color_jitter": 0.0}))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    dropped, mirrored = 0, set()
    for seed in range(60):
        random.seed(seed)
        torch.manual_seed(seed)
        target = {"boxes": boxes, "labels": torch.arange(4), "iscrowd": torch.zeros(4).bool(), "image_id": 5}
        x, seen = prepare(image, target, size, True)
        assert x.shape == (3, size, size) and seen["image_id"] == 5 and type(seen["boxes"]) is torch.Tensor
        assert len(seen["boxes"]) == len(seen["labels"]) == len(seen["iscrowd"])
        of_label = dict(zip(seen["labels"].tolist(), seen["boxes"], strict=True))
        for label, colour in enumerate(COLOURS):
            near = ((x * std + mean - torch.tensor(colour).view(3, 1, 1) / 255).abs() < 0.5).all(0)
            rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
            if label not in of_label:
                dropped += 1
                whole = (boxes[label, 2:] - boxes[label, :2]).prod() * (2.5 * size / 150) ** 2
                assert near.sum() < 0.3 * whole + 20
                continue
            box = of_label[label]
            assert (box >= 0).all() and (box <= size).all()
            drawn = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            assert (box - drawn).abs().max() <= 1.5, (seed, label)
        if {0, 1} <= of_label.keys():
            mirrored.add(bool(of_label[0][0] > of_label[1][0]))
    assert dropped > 5 and mirrored == {True, False}


def test_training_batches_are_a_function_of_seed_epoch_and_start(root):
    settings = recipe(root, batch_size=2, sizes=[32, 64, 96], seed=2)
    whole = list(coco.CocoData(settings, Replica()).train(3))
    assert len({x.shape for x, _ in whole}) > 1
    later = list(coco.CocoData(settings, Replica()).train(3, 2))
    assert len(whole) == 4 and len(later) == 2
    for (x, targets), (again, others) in zip(whole[2:], later, strict=True):
        assert torch.equal(x, again)
        for target, other in zip(targets, others, strict=True):
            assert target["image_id"] == other["image_id"] and torch.equal(target["boxes"], other["boxes"])
    other_epoch = next(coco.CocoData(settings, Replica()).train(4))[0]
    assert whole[0][0].shape != other_epoch.shape or not torch.equal(whole[0][0], other_epoch)


@pytest.mark.parametrize("zero_init_last, steps", [(False, 30), (True, 40)])
def test_a_box_is_learned(root, zero_init_last, steps):
    """The loss of one batch decreases, with the task, loss and optimiser of training; later if branches start at 0."""
    from xformer.recipes.tasks.detect import Detect

    torch.manual_seed(0)
    settings = recipe(root, scale=[1.0, 1.0], hflip=0.0, color_jitter=0.0)
    settings.model_options["zero_init_last"] = zero_init_last
    task = Detect(settings)
    model = task.build().train()
    x, targets = next(task.data.train(0))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(steps):
        loss = task.loss(model(x), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_files_that_cannot_be_read_are_skipped_and_named(root, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    images = sorted((copy / "train2017").iterdir())
    images[0].write_bytes(b"nothing")
    images[1].unlink()
    Image.new("RGB", (10, 10)).save(images[2])
    data = coco.CocoData(recipe(copy), Replica())
    assert sum(len(x) for x, _ in data.train(0)) == 8
    assert data.skipped.count == 3
    said = " ".join(data.skipped.reasons.values())
    assert "no image" in said and "No such file" in said and "it is 10x10, and its annotations are of 96x64" in said
    sorted((copy / "val2017").iterdir())[2].unlink()
    assert sum(len(x) for x, _ in data.evaluate()) == 3 and data.skipped.count == 4


def test_boxes_without_area_are_dropped_and_others_cut(root, tmp_path, caplog):
    said = json.loads(annotation_file(root, "train").read_text())
    wrong = [[1.0, 1.0, 0.0, 5.0], [1.0, 1.0, 5.0, -2.0], [96.0, 5.0, 9.0, 9.0]]
    said["annotations"] = [record(i, box, 1) for i, box in enumerate([*wrong, [90, -3, 10, 10]])]
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    annotation_file(copy, "train").write_text(json.dumps(said))
    data = coco.CocoData(recipe(copy), Replica())
    assert data.dropped == 3 and "3 boxes without area are left out" in caplog.text
    pictures = coco.open_coco(copy)[0]
    assert pictures.annotations.boxes.tolist() == [[90, 0, 96, 7]]
    assert list(pictures.others(Batch([6], 0, [], []), 0))[:2] == [7, 0]


GOOD = record(7, [1.0, 2.0, 3.0, 4.0], 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": None}, "annotation 7: bbox must be four finite numbers, got None"),
        ({"bbox": [1, 2, 3]}, "annotation 7: bbox must be four finite numbers"),
        ({"bbox": [1, 2, "3", 4]}, "annotation 7: bbox must be four finite numbers"),
        ({"bbox": [1, 2, 3, float("nan")]}, "annotation 7: bbox must be four finite numbers"),
        ({"image_id": 99}, "annotation 7: image_id must be that of a record of the file, got 99"),
        ({"image_id": "1"}, "annotation 7: image_id must be an integer, got '1'"),
        ({"category_id": 2}, "annotation 7: category_id must be that of a record"),
        ({"category_id": True}, "annotation 7: category_id must be an integer"),
        ({"iscrowd": 2}, "annotation 7: iscrowd must be 0 or 1, got 2"),
        ({"area": "large"}, "annotation 7: area must be a finite number"),
        ({"id": None}, "annotation number 0 of the list must be a record with an id"),
    ],
)  # fmt: skip
def test_corrupt_annotations_are_named(root, tmp_path, change, message):
    refused(root, tmp_path, lambda said: said | {"annotations": [GOOD | change]}, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: [], "must hold a list 'categories'"),
        (lambda said: said | {"annotations": None}, "must hold a list 'annotations'"),
        (lambda said: said | {"annotations": [{k: v for k, v in GOOD.items() if k != "bbox"}]}, "7 has no bbox"),
        (lambda said: said | {"annotations": [GOOD, GOOD]}, "annotation 7 is there twice"),
        (lambda said: said | {"images": [{"id": 1, "file_name": "a.jpg", "height": 64}]}, "image 1 has no width"),
        (lambda said: said | {"images": [{"id": 1, "file_name": 3}]}, "image 1: file_name must be a name that a file"),
        (lambda said: said | {"images": []}, "must have images and categories"),
        (lambda said: said | {"categories": [{"id": 3}]}, "category 3 has no name"),
        (lambda said: said | {"annotations": []}, "has no boxes to be found"),
        (lambda said: said | {"categories": [*said["categories"], {"id": 2, "name": "x"}]}, "the same categories"),
    ],
)  # fmt: skip
def test_corrupt_files_are_named(root, tmp_path, change, message):
    refused(root, tmp_path, change, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: said | {"images": [{"id": 2**63, "file_name": "a", "height": 9, "width": 9}]}, "of 64 bits, got"),
        (lambda said: said | {"annotations": [GOOD | {"id": -(2**64)}]}, "annotation number 0 of.* of 64 bits, got"),
        (lambda said: said | {"images": [{"id": 1, "file_name": "a", "height": 2**40, "width": 9}]}, "height must be"),
        (lambda said: said | {"annotations": [GOOD | {"bbox": [1, 2, 10**400, 3]}]}, "7: bbox must be four finite"),
        (lambda said: said | {"annotations": [GOOD | {"area": 10**400}]}, "7: area must be a finite number"),
        (lambda said: said | {"images": [{"id": 1, "file_name": "\ud800.jpg"}]}, "image 1: file_name must be"),
        (lambda said: said | {"images": [{"id": 1, "file_name": "a\0.jpg"}]}, "image 1: file_name must be"),
        (lambda said: said | {"annotations": [GOOD | {"iscrowd": 1}]}, "no boxes to be found, but for 1 of crowds"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("split", ["train", "val"])
def test_numbers_and_names_that_nothing_can_hold_are_named(root, tmp_path, split, change, message):
    refused(root, tmp_path, change, message, split)


def test_a_category_above_all_others_is_no_class(root, tmp_path, caplog):
    """Roboflow writes a category above all others. It is a class only if it has boxes or is not above the others."""
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    for split in ("train", "val"):
        path = annotation_file(copy, split)
        said = json.loads(path.read_text())
        said["categories"] = [c | {"supercategory": "shapes"} for c in said["categories"]]
        said["categories"].insert(0, {"id": 0, "name": "shapes", "supercategory": "none"})
        path.write_text(json.dumps(said))
    data = coco.CocoData(recipe(copy), Replica())
    assert data.classes == [kind.name for kind in sorted(KINDS, key=lambda kind: kind.category)]
    assert caplog.text.count("category shapes is of no box and above all others") == 2
    (_, targets), (_, others) = (next(d.train(0)) for d in (data, coco.CocoData(recipe(root), Replica())))
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(targets, others, strict=True))
    for split in ("train", "val"):
        path = annotation_file(copy, split)
        said = json.loads(path.read_text())
        said["annotations"].append(record(990, [1.0, 1.0, 9.0, 9.0], 1, category_id=0))
        path.write_text(json.dumps(said))
    assert coco.CocoData(recipe(copy), Replica()).classes[0] == "shapes"


def test_layer_decay_goes_by_the_depth_of_the_backbone(root, tmp_path):
    from timm.models import group_parameters

    from xformer.segmentation import Segmenter

    for model in (coco_task(root).build(), Segmenter("xformer_xxs", 19)):
        groups = group_parameters(model, model.group_matcher(), reverse=True)
        of_backbone = [groups[name] for name, _ in model.named_parameters() if name.startswith("backbone.")]
        rest = {groups[name] for name, _ in model.named_parameters() if not name.startswith("backbone.")}
        assert of_backbone == sorted(of_backbone) and of_backbone[0] == 0
        assert len(set(of_backbone)) > 5 and rest == {max(of_backbone) + 1}


def coco_task(root):
    from xformer.recipes.tasks.detect import Detect

    return Detect(recipe(root))


def refused(root, tmp_path, change, message, split="val"):
    for path in root.iterdir():
        if path.name != "annotations":
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(root / "annotations", tmp_path / "annotations")
    path = annotation_file(tmp_path, split)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UsageError, match=message) as caught:
        coco.open_coco(tmp_path)
    assert str(tmp_path) in str(caught.value)
    path.write_text("{")
    with pytest.raises(UsageError, match="is not JSON") as caught:
        coco.open_coco(tmp_path)
    assert str(path) in str(caught.value)


def test_what_is_refused(root, tmp_path):
    for changes, message in (
        ({"data": str(tmp_path)}, "data must be a folder with train2017/ and annotations/instances_train2017.json"),
        ({"batch_size": 9}, "there are 8 training images"),
        ({"smoothing": 0.2}, "smoothing means nothing to task detect, got 0.2"),
        ({"scale": [2.0, 1.0]}, "scale must be two factors above 0 in order"),
        ({"hflip": 1.5}, "hflip must be from 0 to 1, got 1.5"),
        ({"color_jitter": -1.0}, "color_jitter must be finite, 0 or more, got -1.0"),
        ({"model": "resnet18"}, "backbone_name must be one of xformer_s"),
        ({"model_options": {"depth": 3}}, "of task detect does not take these options"),
        ({"model_options": {"anchors": [1, 2]}}, "of task detect does not take these options"),
        ({"model_options": {"anchors": [[1, 2]]}}, "anchors must be 9 pairs"),
    ):
        with pytest.raises(UsageError, match=message):
            train(recipe(root, tmp_path / "out", **changes))


def test_the_recipe_has_anchors_of_its_scenes():
    from xformer.detection.boxes import check_anchors

    assert len(check_anchors(load_recipe("detect_shapes").model_options["anchors"])) == 9
