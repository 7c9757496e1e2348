"""Small data sets in which every image has one colour that identifies it."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import torch
from PIL import Image

from xformer.recipes.data.classification import open_data
from xformer.recipes.data.order import Replica
from xformer.recipes.settings import Recipe

CLASSES = ("ant", "bee", "cat")
SIZE = 8


def colour(number):
    return (number % 256, number // 256, 77)


def image_bytes(number, format="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (12, 10), colour(number)).save(file, format)
    return file.getvalue()


def make_folder(root: Path, train=30, val=13, first_val=500):
    """Writes `train` and `val` images, numbered from 0 and `first_val`, to the folders of three classes."""
    for part, count, first in (("train", train, 0), ("val", val, first_val)):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
        for index in range(count):
            label = index * len(CLASSES) // count
            (root / part / CLASSES[label] / f"{first + index:04d}.png").write_bytes(image_bytes(first + index))
    return root


def sample_files(number, label, image=None):
    return {"png": image_bytes(number) if image is None else image, "cls": f"{label}".encode()}


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for ending, content in files.items():
                entry = tarfile.TarInfo(f"{key}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def make_shards(root: Path, shards=3, train=30, val=13, first_val=500, val_shards=None):
    """Writes the images of `make_folder` to shards, with their number as key."""
    for part, count, first, parts in (("train", train, 0, shards), ("val", val, first_val, val_shards or shards)):
        for shard in range(parts):
            numbers = range(first + shard, first + count, parts)
            samples = {f"{number:04d}": sample_files(number, number % len(CLASSES)) for number in numbers}
            write_tar(root / f"small-{part}-{shard:04d}.tar", samples)
    return root


def write_info(root: Path, lengths: dict[str, int]):
    split = {"filenames": list(lengths), "shard_lengths": list(lengths.values())}
    (root / "_info.json").write_text(json.dumps({"splits": {"all": split}}))


def recipe(data, **settings):
    settings = {"workers": 0, "batch_size": 4, "image_size": SIZE, "scale": [0.5, 1.0], **settings}
    return Recipe(data=str(data), **settings)


def opened(data, rank=0, world=1, **settings):
    return open_data(recipe(data, **settings), Replica(rank, world))


def numbers_of(images, data):
    """The numbers that the colours of images encode."""
    pixels = images[:, :, SIZE // 2, SIZE // 2] * torch.tensor(data.std) + torch.tensor(data.mean)
    red, green, _ = (pixels * 255).round().long().unbind(1)
    return (red + 256 * green).tolist()


def evaluated(data):
    return [number for images, _ in data.evaluate() for number in numbers_of(images, data)]


def bomb():
    """A PNG with a header of 60000 x 60000 pixels and almost no data."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def broken_images():
    """File contents that are not valid images, by what is wrong with them."""
    whole = image_bytes(900, "JPEG")
    return {"empty": b"", "text": b"this is no image\n", "cut": whole[: len(whole) // 2], "bomb": bomb()}
