"""Training on data in Cityscapes' layout: classes, crops, metrics, and runs of a few steps."""

import json
import shutil

import numpy as np
import pytest
import torch
from eval_cases import evaluated
from PIL import Image

from experiments.shapes import make_shapes
from xformer import __main__ as command
from xformer.errors import UsageError
from xformer.recipes.data import segmentation as cityscapes
from xformer.recipes.data.order import Replica
from xformer.recipes.data.segmentation import CITYSCAPES, CLASSES, IDS
from xformer.recipes.settings import load_recipe
from xformer.recipes.tasks.segment import MeanIoU
from xformer.recipes.train import train
from xformer.recipes.weights import load_model, load_weights


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "made"
    make_shapes(folder, images=8, held_out=3, size=(64, 96))
    return folder / "cityscapes"


def recipe(root, out="unused", **changes):
    settings = {
        "task": "segment", "data": str(root), "out": str(out), "image_size": 64, "batch_size": 4, "epochs": 2,
        "scale": [0.75, 1.5], "workers": 0, "threads": 1, "tensorboard": False, "log_every": 1, "lr": 1e-3,
        "model_options": {"width": 32}, "warmup_epochs": 0.0,
    }  # fmt: skip
    return load_recipe("", settings | changes)


def test_classes_are_those_of_the_official_scripts():
    labels = pytest.importorskip("cityscapesscripts.helpers.labels", reason="the official scripts are not installed")
    for label in labels.labels:
        if label.id >= 0:
            assert CITYSCAPES.lookup()[label.id] == (label.trainId if 0 <= label.trainId < 19 else 255), label.name
            if 0 <= label.trainId < 19:
                assert CLASSES[label.trainId] == label.name


def test_evaluation_images_are_whole_and_come_once(root):
    batches = [b for rank in range(2) for b in cityscapes.CityscapesData(recipe(root), Replica(rank, 2)).evaluate()]
    assert sum(len(x) for x, _ in batches) == 3
    for x, y in batches:
        assert x.shape[1:] == (3, 64, 96) and y.shape[1:] == (64, 96)
        assert set(y.unique().tolist()) <= {*range(19), 255}


@pytest.mark.parametrize("size", [48, 128])
def test_training_crops_have_the_size_and_their_labels(root, size):
    """Labels of a crop match its pixels: the colours of sky and road would not fit shifted labels."""
    data = cityscapes.CityscapesData(recipe(root, image_size=size), Replica())
    for x, y in data.train(0):
        assert x.shape == (4, 3, size, size) and y.shape == (4, size, size)
        sky, road = (y == CLASSES.index(name) for name in ("sky", "road"))
        blue = x[:, 2] - x[:, 0]
        assert blue[sky].mean() > blue[road].mean() + 0.3
        outside = (x == 0).all(1)
        assert (y[outside] == 255).all()
    first, again = (next(cityscapes.CityscapesData(recipe(root), Replica()).train(3, 1)) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_images_of_several_sizes_are_padded_without_a_class():
    x, y = cityscapes.collate(
        [(torch.ones(3, h, w), torch.zeros(h, w, dtype=torch.int64)) for h, w in ((5, 9), (7, 3))]
    )
    assert x.shape == (2, 3, 7, 9) and (y[0, 5:] == 255).all() and (y[1, :, 3:] == 255).all() and (y == 0).sum() == 66


def test_metrics_are_those_of_the_official_scripts(root, tmp_path, monkeypatch):
    """The official scripts and our metric give the same result for the same labels and predictions."""
    name = "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling"
    monkeypatch.setenv("CITYSCAPES_EXPORT_DIR", str(tmp_path))
    official = pytest.importorskip(name, reason="the official scripts are not installed")
    metric = MeanIoU(19, "cpu")
    scenes = cityscapes.Scenes(root, "train")
    generator = np.random.default_rng(0)
    labels, predictions = [], []
    for item in range(len(scenes)):
        _, classes = scenes.read(item)
        guess = np.where(classes == 255, 0, classes)
        wrong = generator.random(guess.shape) < 0.3
        guess = np.where(wrong, generator.integers(0, 12, guess.shape), guess)
        logits = torch.nn.functional.one_hot(torch.from_numpy(guess), 19).permute(2, 0, 1)[None].float()
        metric.matrix.update(logits.argmax(1), torch.from_numpy(classes.astype(np.int64))[None])
        labels.append(str(scenes.label_of(scenes.images[item])))
        predictions.append(str(tmp_path / f"{item}.png"))
        Image.fromarray(np.array(IDS, np.uint8)[guess]).save(predictions[-1])
    arguments = official.args
    monkeypatch.setattr(arguments, "quiet", True)
    monkeypatch.setattr(arguments, "evalInstLevelScore", False)
    monkeypatch.setattr(arguments, "JSONOutput", False)
    monkeypatch.setattr(arguments, "evalPixelAccuracy", False)
    found = official.evaluateImgLists(predictions, labels, arguments)
    assert metric.compute()["miou"] == pytest.approx(100 * found["averageScoreClasses"], rel=1e-9)
    for name, score in found["classScores"].items():
        if name in CLASSES:
            ours = metric.per_class()[CLASSES.index(name)].item()
            assert ours == pytest.approx(score, rel=1e-9, nan_ok=True), name


def test_corrupt_files_are_skipped_and_named(root, tmp_path, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    images = sorted((copy / "leftImg8bit" / "train" / "shapes").iterdir())
    images[0].write_bytes(b"nothing")
    cityscapes.Scenes.label_of(images[1]).write_bytes(b"")
    Image.new("L", (10, 10)).save(cityscapes.Scenes.label_of(images[2]))
    data = cityscapes.CityscapesData(recipe(copy), Replica())
    assert sum(len(x) for x, _ in data.train(0)) == 8
    assert data.skipped.count == 3
    said = " ".join(data.skipped.reasons.values())
    assert "labels do not decode" in said and "its labels are of (10, 10), not of (64, 96)" in said


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("change", "message"), [
    (lambda labels: CITYSCAPES.lookup()[labels], "must hold Cityscapes' labelIds.*hold trainIds"),
    (lambda labels: np.zeros_like(labels), "no pixel has a class in .* such as shapes_000001_000019_gtFine_labelIds"),
])  # fmt: skip
def test_labels_of_another_kind_are_named(root, tmp_path, split, change, message):
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    for path in (copy / "gtFine" / split).rglob("*.png"):
        Image.fromarray(change(np.asarray(Image.open(path)))).save(path)
    with pytest.raises(UsageError, match=message) as caught:
        cityscapes.CityscapesData(recipe(copy), Replica())
    assert str(copy / "gtFine" / split) in str(caught.value)


def test_few_images_with_a_class_are_enough(root, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    shapes = copy / "leftImg8bit" / "train" / "shapes"
    (first, *_) = sorted(shapes.iterdir())
    blank = Image.fromarray(np.zeros((64, 96), np.uint8))
    for number in range(30):
        path = shapes / f"more_{number:06}_000019_leftImg8bit.png"
        shutil.copy(first, path)
        blank.save(cityscapes.Scenes.label_of(path))
    for path in (copy / "gtFine" / "train").rglob("shapes_00000[1-7]*.png"):
        blank.save(path)
    assert cityscapes.CityscapesData(recipe(copy), Replica()).train_images == 38


def test_a_backbone_of_timm_in_every_command(root, tmp_path):
    """Its weights and their card are enough for eval, predict and export, also of images of other sizes."""
    name = "timm:mobilenetv2_050"
    result = train(recipe(root, tmp_path / "run", model=name, epochs=1))
    weights = tmp_path / "run" / "last.safetensors"
    card = load_weights(weights)[1]
    assert card is not None and (card.model, card.task, card.options) == (name, "segment", {"width": 32})
    assert evaluated(weights, root)[0]["miou"] == pytest.approx(result["miou"])

    image = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 97, 3), dtype=np.uint8)).save(image)
    found = tmp_path / "found.json"
    given = ["--weights", str(weights)]
    assert command.main(["predict", str(image), *given, "--json", str(found), "--out", str(tmp_path / "pictures")]) == 0
    (said,) = json.loads(found.read_text())
    assert (said["width"], said["height"]) == (97, 70)
    assert sum(of_it["share"] for of_it in said["classes"]) == pytest.approx(1)
    assert command.main(["export", *given, "--to", str(tmp_path / "model.pt2"), "--size", "dynamic"]) == 0
    file = torch.export.load(tmp_path / "model.pt2").module()
    model, x = load_model(weights)[0], torch.randn(2, 3, 70, 97)
    with torch.no_grad():
        torch.testing.assert_close(file(x), model(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="layer_decay must be 0: the backbone has no group_matcher"):
        train(recipe(root, tmp_path / "decay", model=name, layer_decay=0.7))


def test_what_is_refused(root, tmp_path):
    (tmp_path / "leftImg8bit").mkdir()
    (tmp_path / "gtFine").mkdir()
    for changes, message in (
        ({"data": str(root / "nowhere")}, "data must be a folder with leftImg8bit/ and gtFine/"),
        ({"data": str(tmp_path)}, "there are no images leftImg8bit/train"),
        ({"batch_size": 9}, "there are 8 training images"),
        ({"reprob": 0.3}, "reprob means nothing to task segment, got 0.3"),
        ({"scale": [2.0, 1.0]}, "scale must be two factors above 0 in order"),
        ({"model": "resnet18"}, "backbone_name must be one of xformer_s"),
        ({"model": "timm:resnet18", "attention": "xfa"}, "of task segment does not take these options"),
        ({"model_options": {"depth": 3}}, "of task segment does not take these options"),
    ):
        with pytest.raises(UsageError, match=message):
            train(recipe(root, tmp_path / "out", **changes))
