"""Data set in Cityscapes' folder layout: classes, label images and batches of images and per-pixel classes."""

from __future__ import annotations

import csv
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from xformer.errors import UsageError
from xformer.recipes.card import Card
from xformer.recipes.data.images import Skipped, Unreadable, check_resized, open_image
from xformer.recipes.data.order import Replica, digest
from xformer.recipes.data.sets import DataSet, Indexed, indexed, scale_of
from xformer.recipes.data.transforms import Statistics, to_tensor
from xformer.recipes.settings import Recipe
from xformer.registry import MEAN, STD

IGNORE = 255
"""Target of ignored pixels."""
COLUMNS = ("name", "id", "red", "green", "blue")


@dataclass
class Labels:
    """Names, ids in label images (0 to 255) and optional RGB colours, all in the order of the logits."""

    names: list[str]
    ids: list[int]
    colours: list[tuple[int, int, int]] = field(default_factory=list)

    def lookup(self) -> np.ndarray:
        """Lookup table (256,) uint8 from id to class; IGNORE for ids that are not a class."""
        table = np.full(256, IGNORE, np.uint8)
        table[self.ids] = np.arange(len(self.ids))
        return table


CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
COLOURS = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
    (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70),
    (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
)  # fmt: skip
"""RGB of the classes, as in Cityscapes' own scripts (cityscapesscripts.helpers.labels)."""
IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES = Labels(list(CLASSES), list(IDS), list(COLOURS))


def labels_of(classes: str, weights: Card | None = None) -> Labels:
    """The classes of the file `classes` if given, else those of the weights' card, else Cityscapes' 19."""
    if classes:
        return read_labels(classes)
    if weights is not None and weights.class_ids and weights.classes:
        return Labels(list(weights.classes), list(weights.class_ids), [(r, g, b) for r, g, b in weights.colours])
    return CITYSCAPES


def read_labels(path: str | Path) -> Labels:
    """Read classes from a CSV file with the columns name, id and optionally red, green and blue.

    A file without this header has one name per line, with ids 0, 1, ... in this order.

    Raises:
        UsageError: missing file, invalid rows, or duplicate names or ids.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"classes: {path} cannot be read as text: {error}") from error
    reader = csv.DictReader(lines, skipinitialspace=True)
    titles = [title.strip().lower() for title in reader.fieldnames or ()]
    if set(titles) >= {"name", "id"}:
        reader.fieldnames = titles
        coloured = set(titles) >= set(COLUMNS)
        rows = [_row(f"classes: line {number} of {path}", row, coloured) for number, row in enumerate(reader, 2)]
        found = Labels([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows if row[2]])
    else:
        found = Labels([line.strip() for line in lines], list(range(len(lines))))
    counts = Counter([*(("name", name) for name in found.names), *(("id", number) for number in found.ids)])
    for (what, value), count in counts.items():
        if count > 1:
            raise UsageError(f"classes: {path} has the {what} {value} twice")
    if not 1 <= len(found.names) <= IGNORE:
        raise UsageError(f"classes: {path} must name from 1 to {IGNORE} classes, got {len(found.names)}")
    return found


def _row(where: str, row: dict[str, Any], coloured: bool) -> tuple[str, int, tuple[int, int, int] | tuple[()]]:
    name = (row["name"] or "").strip()
    numbers = []
    for column in COLUMNS[1:] if coloured else COLUMNS[1:2]:
        text = (row[column] or "").strip()
        if not (text.isdecimal() and int(text) < 256):
            raise UsageError(f"{where}: {column} must be an integer from 0 to 255, got {text!r}")
        numbers.append(int(text))
    if not name:
        raise UsageError(f"{where} has no name")
    return name, numbers[0], (numbers[1], numbers[2], numbers[3]) if coloured else ()


LOOKED_AT = 8
"""Number of label images that are checked before a run."""
IMAGE, LABEL = "leftImg8bit", "gtFine"


# not torchvision's Cityscapes: its classes and ids are fixed
class Scenes(Indexed):
    """Pairs of files ``leftImg8bit/split/city/*_leftImg8bit.png`` and ``gtFine/split/city/*_gtFine_labelIds.png``."""

    def __init__(self, root: Path, split: str, labels: Labels = CITYSCAPES) -> None:
        self.labels, self.lookup = labels, labels.lookup()
        self.images = sorted((root / IMAGE / split).glob(f"*/*_{IMAGE}.png"))
        if not self.images:
            raise UsageError(f"data: there are no images {IMAGE}/{split}/<city>/*_{IMAGE}.png in {root}")
        missing = next((path for path in map(self.label_of, self.images) if not path.is_file()), None)
        if missing is not None:
            raise UsageError(f"data: there is no {missing}, the labels of an image that is there")
        self.count = len(self.images)
        self._check_labels()

    def _check_labels(self) -> None:
        """Check the label images of a sample of images; of all images if the sample contains no class.

        Raises:
            UsageError: no pixel has a class, or labels are trainIds where Cityscapes' labelIds are expected.
        """
        some = range(0, self.count, max(1, self.count // LOOKED_AT))
        seen = np.zeros(256, bool)
        for number, item in enumerate([*some, *(set(range(self.count)) - set(some))]):
            if number >= len(some) and (self.lookup[seen] != IGNORE).any():
                break
            try:
                labels = self._labels(item)
            except Unreadable:
                continue
            seen |= np.bincount(labels.ravel(), minlength=256).astype(bool)
        of_it = self.label_of(self.images[0])
        if seen.any() and not (self.lookup[seen] != IGNORE).any():
            raise UsageError(
                f"data: no pixel has a class in the label images of {of_it.parents[1]}, such as {of_it.name}: their "
                f"numbers are {', '.join(map(str, np.flatnonzero(seen)[:5]))}, and those of the classes "
                f"{', '.join(map(str, self.labels.ids[:5]))} and so on"
            )
        if self.labels == CITYSCAPES and seen[IGNORE] and not seen[len(self.labels.ids) : IGNORE].any():
            raise UsageError(
                f"data: label images must hold Cityscapes' labelIds, from 0 to 33 with 0 for no class, and those of "
                f"{of_it.parents[1]}, such as {of_it.name}, hold trainIds: nothing from 19 on but 255; `classes` "
                f"names a file of other classes and ids"
            )

    def _labels(self, item: int) -> np.ndarray:
        """Label ids as stored in the file, (H, W) uint8."""
        try:
            with Image.open(self.label_of(self.images[item])) as file:
                labels = np.asarray(file)
        except Exception as error:  # Pillow's decoders raise errors of any kind
            raise Unreadable(f"its labels do not decode: {error}") from error
        if labels.dtype != np.uint8 or labels.ndim != 2:
            raise Unreadable(f"its labels are {labels.dtype} of {labels.shape}, not bytes of (H, W)")
        return labels

    @staticmethod
    def label_of(image: Path) -> Path:
        city, split, root = image.parent.name, image.parents[1].name, image.parents[3]
        return root / LABEL / split / city / f"{image.name.removesuffix(f'_{IMAGE}.png')}_{LABEL}_labelIds.png"

    def digest(self) -> str:
        return digest([f"{path.parent.name}/{path.name}" for path in self.images])

    def name(self, item: int) -> str:
        return str(self.images[item])

    def read(self, item: int) -> tuple[Image.Image, np.ndarray]:
        """RGB image and the classes of its pixels, (H, W) uint8."""
        image = open_image(self.images[item])
        labels = self._labels(item)
        if labels.shape != (image.height, image.width):
            turned = labels.shape == image.size
            why = ": EXIF says that the image is turned, and labels are not" if turned else ""
            raise Unreadable(f"its labels are of {labels.shape}, not of {image.size[::-1]}{why}")
        return image, self.lookup[labels]


# not torchvision's transforms v2: they draw other random numbers, so that no existing run could be resumed
class SegmentTransform:
    """Convert image and classes to tensors (3, h, w) float32 and (h, w) int64.

    In training: scaling by a random factor from ``scale``, horizontal flip, color jitter and a random square crop;
    padding is ignored. In evaluation the image is only normalised.
    """

    def __init__(self, recipe: Recipe, weights: Card | None = None) -> None:
        from torchvision.transforms import ColorJitter

        self.scale, self.hflip, color_jitter = scale_of(recipe), recipe.hflip, recipe.color_jitter
        self.statistics = (MEAN, STD) if weights is None else (weights.mean, weights.std)
        self.jitter = ColorJitter(color_jitter, color_jitter, color_jitter) if color_jitter else None

    def __call__(self, image: Image.Image, classes: np.ndarray, size: int, training: bool) -> tuple[Tensor, Tensor]:
        if not training:
            return to_tensors(image, classes, *self.statistics)
        factor = random.uniform(*self.scale)
        width, height = (max(1, round(side * factor)) for side in image.size)
        check_resized(height, width)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        of_it = Image.fromarray(classes).resize((width, height), Image.Resampling.NEAREST)
        if random.random() < self.hflip:
            image, of_it = (i.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for i in (image, of_it))
        if self.jitter is not None:
            image = self.jitter(image)
        left, top = random.randint(0, max(0, width - size)), random.randint(0, max(0, height - size))
        box = (left, top, min(width, left + size), min(height, top + size))
        x, y = to_tensors(image.crop(box), np.asarray(of_it.crop(box)))
        return pad(x, y, size, size)


def to_tensors(
    image: Image.Image, classes: np.ndarray, mean: Statistics = MEAN, std: Statistics = STD
) -> tuple[Tensor, Tensor]:
    return to_tensor(image, mean, std), torch.from_numpy(classes.astype(np.int64))


def pad(x: Tensor, y: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Pad image and classes to a size, at the bottom and right; padded pixels have class IGNORE."""
    more = (0, width - x.shape[2], 0, height - x.shape[1])
    return F.pad(x, more), F.pad(y, more, value=IGNORE)


def collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Stack to (B, 3, H, W) and (B, H, W), padded to the largest sides."""
    height, width = (max(x.shape[i] for x, _ in samples) for i in (1, 2))
    padded = [pad(x, y, height, width) for x, y in samples]
    return torch.stack([x for x, _ in padded]), torch.stack([y for _, y in padded])


class CityscapesData(DataSet):
    """Data set of a folder with leftImg8bit/ and gtFine/; the evaluation batch size is 1.

    Attention covers padding too, so padding images to a common size would change their predictions.
    `weights`: see :class:`xformer.recipes.tasks.Task`.

    Raises:
        UsageError: missing folder or files, invalid settings, fewer images than a batch.
    """

    def __init__(self, recipe: Recipe, replica: Replica, weights: Card | None = None) -> None:
        root = Path(recipe.data)
        if not (root / IMAGE).is_dir() or not (root / LABEL).is_dir():
            raise UsageError(f"data must be a folder with {IMAGE}/ and {LABEL}/, got {recipe.data!r}")
        self.labels = labels_of(recipe.classes, weights)
        self.classes = list(self.labels.names)
        train = Scenes(root, "train", self.labels) if weights is None else None
        content = indexed(recipe, replica, train, Scenes(root, "val", self.labels), eval_batch=1)
        super().__init__(recipe, replica, content, SegmentTransform(recipe, weights), collate, Skipped())
