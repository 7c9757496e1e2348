"""Weights are evaluated on images prepared as their card states, without training data, if the data match them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from eval_cases import evaluated, refused, write
from PIL import Image
from safetensors.torch import save_file
from scene_cases import LAYOUTS, make_scenes
from scene_cases import recipe as scene_recipe
from train_cases import make_images

from xformer import __main__ as command
from xformer.errors import UsageError
from xformer.recipes.card import Card
from xformer.recipes.data.classification import open_data
from xformer.recipes.settings import load_recipe
from xformer.recipes.tasks import find_task
from xformer.recipes.weights import load_model, load_weights
from xformer.registry import MEAN, STD

SCENES = tuple(LAYOUTS)


# ------------------------------------------------------------------------------------------ images as the card says


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A card with the statistics of digits, and the held-out digits as PNG files in class folders."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from xformer.recipes.data.files import open_samples

    root = tmp_path_factory.mktemp("digits")
    _, held_out, classes, (mean, std) = open_samples("digits")
    card = Card("xformer_xxs", 10, image_size=32, crop_pct=0.9, mean=mean, std=std, classes=classes)
    for number, (pixels, label) in enumerate(zip(held_out.pixels, held_out.labels, strict=True)):
        folder = root / "images" / "val" / classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number:04}.png")
    return root, card


def test_the_same_images_have_the_same_metrics_however_they_are_stored(digits, capsys):
    """The built-in data set and files give the same metrics. Explicit settings override those of the card."""
    root, card = digits
    weights = write(root / "w.safetensors", card)
    result, said = evaluated(weights, "digits")
    stored, of_files = evaluated(weights, root / "images")
    # files are in the order of their classes: the batches, and so the sums of losses in float32, are other ones
    assert result["loss"] > 0 and stored == pytest.approx(result, rel=1e-6) and of_files == said
    assert said == [f"{weights}: xformer_xxs, images of {find_task(card.task).preprocessing(card)}", "360 images"]
    assert "32 pixels by bicubic, crop_pct 0.9, less mean 0.305" in said[0]
    other = replace(card, mean=MEAN, std=STD)
    assert evaluated(write(root / "other.safetensors", other), root / "images")[0] != result
    asked, said = evaluated(weights, root / "images", ["image_size"], image_size=48)
    assert asked != result and "48 pixels" in said[0]
    (root / "images/val/3/bad.png").write_bytes(b"no image")
    assert evaluated(weights, root / "images")[1][1] == "360 images, 1 unreadable images skipped"
    (root / "images/val/3/bad.png").unlink()

    assert command.main(["eval", "--weights", weights, "--data", str(root / "images"), "--workers", "0"]) == 0
    used, count, metrics = capsys.readouterr().out.splitlines()
    assert (used, count) == (
        f"{weights}: xformer_xxs, images of {find_task(card.task).preprocessing(card)}",
        "360 images",
    )
    assert metrics == "  ".join(f"{name} {value:.4f}" for name, value in result.items())


def test_weights_of_timm_are_evaluated_by_what_timm_says_of_images(tmp_path, digits):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    recipe = load_recipe("", {"data": str(digits[0] / "images"), "workers": 0})
    _, card = load_model(tmp_path / "w.safetensors", "vit_tiny_patch16_224")
    seen = open_data(recipe, weights=card)
    assert (seen.mean, seen.std) == ((0.5,) * 3, (0.5,) * 3)
    for folder in (digits[0] / "images" / "val").iterdir():  # an image of each class: 224 x 224 pixels take a while
        (tmp_path / "few" / "val" / folder.name).mkdir(parents=True)
        shutil.copy(next(folder.glob("*.png")), tmp_path / "few" / "val" / folder.name)
    _, said = evaluated(tmp_path / "w.safetensors", tmp_path / "few", ["model"], model="vit_tiny_patch16_224")
    assert "224 pixels by bicubic, crop_pct 0.9, less mean 0.5 0.5 0.5, by std 0.5 0.5 0.5" in said[0]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes") / "made")


@pytest.mark.parametrize("task", SCENES)
def test_scenes_are_normalised_as_the_card_says(task, scenes):
    recipe = scene_recipe(task, scenes, batch_size=1)
    mean, std = (0.1, 0.2, 0.3), (0.9, 0.8, 0.7)
    card = replace(find_task(task)(recipe).card(), mean=mean, std=std)
    plain, other = (find_task(task)(recipe, weights=of).data for of in (replace(card, mean=MEAN, std=STD), card))
    for (x, _), (y, _) in zip(plain.evaluate(), other.evaluate(), strict=True):
        before, after = ([torch.tensor(v).view(3, 1, 1) for v in values] for values in ((MEAN, STD), (mean, std)))
        inside = x != 0  # padding is the mean, 0 after normalisation
        expected = (x * before[1] + before[0] - after[0]) / after[1]
        torch.testing.assert_close(torch.where(inside, y, 0), torch.where(inside, expected, 0), rtol=1e-5, atol=1e-5)


def test_metrics_do_not_depend_on_the_batch_size(scenes, tmp_path):
    """Images of several sizes in one batch give the same metrics: attention must not see the padding."""
    shutil.copytree(scenes / "cityscapes", tmp_path / "data")
    for number, image in enumerate(sorted((tmp_path / "data").glob("*/val/*/*.png"))):
        size = (96 - 8 * (number % 3), 64 - 4 * (number % 3))
        with Image.open(image) as whole:
            whole.crop((0, 0, *size)).save(image)
    card = find_task("segment")(scene_recipe("segment", scenes)).card()
    weights = write(tmp_path / "w.safetensors", card)
    results = [evaluated(weights, tmp_path / "data", ["batch_size"], batch_size=size)[0] for size in (1, 2, 8)]
    assert results[0] == results[1] == results[2] and results[0]["pixels"] > 0


# -------------------------------------------------------------------------------------- no training data is needed


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def weights(images, tmp_path_factory):
    card = Card("xformer_xxs", 3, image_size=32, classes=["dark", "light", "middle"])
    return write(tmp_path_factory.mktemp("weights") / "w.safetensors", card)


def test_folders_to_evaluate_need_no_training_images(images, weights, tmp_path):
    result, said = evaluated(weights, images)
    assert said[1] == "12 images"
    shutil.copytree(images / "val", tmp_path / "valid")
    assert evaluated(weights, tmp_path)[0] == result
    assert evaluated(weights, tmp_path / "valid")[0] == result, "class folders themselves"

    shutil.rmtree(tmp_path / "valid/dark")
    _, said = evaluated(weights, tmp_path)
    assert said[1] == "8 images", "classes may be missing"
    recipe = load_recipe("", {"data": str(tmp_path), "batch_size": 8, "workers": 0})
    ((_, labels),) = open_data(recipe, weights=load_weights(weights)[1]).evaluate()
    assert labels.tolist() == [1] * 4 + [2] * 4, "numbers are those of the weights"

    (tmp_path / "valid/light").rename(tmp_path / "valid/bright")
    refused(r"must be named as the classes of the weights, such as dark, got bright", weights, tmp_path)
    (tmp_path / "names.txt").write_text("dark\nlight\nmiddle\n")
    refused("must have folders of the 3 classes", weights, tmp_path, classes=str(tmp_path / "names.txt"))
    shutil.copytree(images / "val/dark", tmp_path / "valid/a dark one")
    assert evaluated(weights, tmp_path, classes=str(tmp_path / "names.txt"))[0] == result
    refused("has no val/ or valid/ or validation/ or test/ to evaluate", weights, _only_training(tmp_path / "t"))


def _only_training(root):
    (root / "train" / "dark").mkdir(parents=True)
    return root


def test_shards_to_evaluate_need_no_training_shards(images, weights, tmp_path):
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    import tarfile

    result, _ = evaluated(weights, images)
    with tarfile.open(tmp_path / "x-val.tar", "w") as tar:
        for label, name in enumerate(("dark", "light", "middle")):
            for i in range(4):
                (tmp_path / "label").write_text(f"{label}")
                tar.add(images / "val" / name / f"{i}.png", f"{name}{i}.png")
                tar.add(tmp_path / "label", f"{name}{i}.cls")
    for data, given in (
        (tmp_path, {}),
        (tmp_path / "x-val.tar", {}),
        ("", {"eval_shards": str(tmp_path / "x-val.tar")}),
    ):
        assert evaluated(weights, data, **given)[0] == pytest.approx(result)


@pytest.mark.parametrize("task", SCENES)
def test_scenes_to_evaluate_need_no_training_images(task, scenes, tmp_path):
    card = find_task(task)(scene_recipe(task, scenes)).card()
    weights = write(tmp_path / "w.safetensors", card)
    result, said = evaluated(weights, scenes / LAYOUTS[task])
    assert said[1] == "3 images"
    shutil.copytree(scenes / LAYOUTS[task], tmp_path / "data")
    for path in sorted((tmp_path / "data").rglob("*train*"), reverse=True):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert evaluated(weights, tmp_path / "data") == (result, said)


# ------------------------------------------------------------------------------------------------------------- messages


def test_help_says_defaults_and_there_is_a_version(capsys):
    for arguments in (["train", "--help"], ["eval", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as ended:
            command.main(arguments)
        assert ended.value.code == 0
        printed = " ".join(capsys.readouterr().out.split())
        if arguments == ["--version"]:
            assert printed == f"xformer-kernels {__import__('xformer_kernels').__version__}"
        else:
            assert "peak learning rate (default: 0.002)" in printed and "(default: yes)" in printed
            assert "share of an image's area in a random crop (default: 0.08 1.0)" in printed


@pytest.mark.parametrize(("name", "value", "accepted"), [
    ("epochs", "many", "an integer"), ("epochs", 1.5, "an integer"), ("lr", [1], "a number"),
    ("compile", 1, "true or false"), ("sizes", [1.5], "a list of integers"), ("scale", 1, "a list of numbers"),
    ("data", 5, "text"), ("model_options", "a=1", "a table of settings"),
])  # fmt: skip
def test_types_are_said_in_words(name, value, accepted):
    with pytest.raises(UsageError) as caught:
        load_recipe("", {name: value})
    assert str(caught.value) == f"{name} must be {accepted}, got {value!r}"


def test_the_users_folder_is_expanded(weights, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(weights, tmp_path / "w.safetensors")
    shutil.copytree(images / "val", tmp_path / "val")
    assert command.main(["eval", "--weights=~/w.safetensors", "--data=~", "--workers=0", "--json", "~/m.json"]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["top1"] >= 0
    assert command.main(["predict", "~/val/dark/0.png", "--weights=~/w.safetensors", "--json=~/p.json"]) == 0
    assert json.loads((tmp_path / "p.json").read_text())[0]["error"] == ""


def test_exif_is_named_where_it_is_the_cause(scenes, tmp_path, caplog):
    exif = Image.Exif()
    exif[0x0112] = 6
    for task, pattern in (("detect", "val2017/*.jpg"), ("segment", "leftImg8bit/val/*/*.png")):
        shutil.copytree(scenes / LAYOUTS[task], tmp_path / task)
        path = sorted((tmp_path / task).glob(pattern))[0]
        with Image.open(path) as image:
            image.convert("RGB").save(path, exif=exif)
        caplog.clear()
        list(find_task(task)(scene_recipe(task, tmp_path, data=str(tmp_path / task), batch_size=1)).data.evaluate())
        assert f"skipped {path}" in caplog.text and "EXIF says that the image is turned" in caplog.text
