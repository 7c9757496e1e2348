"""Segmentation classes: names, ids in label images, and colours for drawing."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xformer.card import Card
from xformer.errors import UsageError

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
