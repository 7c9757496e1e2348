"""COCO's formats: read and validate instances files, and convert detections to results as read by pycocotools."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from xformer.errors import UsageError
from xformer.recipes.card import Card
from xformer.recipes.files import is_integer, is_number


@dataclass
class Annotations:
    """Annotations of a file. The boxes of image i are ``boxes[bounds[i]:bounds[i + 1]]``.

    ids: (N,) int64. names: (N,) bytes, file names. sizes: (N, 2) int64, (H, W). boxes: (M, 4) float32, as (x0, y0, x1,
    y1) in pixels, clipped to their images. labels: (M,) int64 from 0, in the order of category ids. crowd: (M,) bool.
    categories: names by id, in this order. dropped: number of boxes without area. truth: data set for pycocotools, with
    all boxes as in the file; empty if not requested. root: name of the category that is not a class, or "".
    """

    ids: np.ndarray
    names: np.ndarray
    sizes: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    bounds: np.ndarray
    categories: dict[int, str]
    dropped: int
    truth: dict[str, Any]
    root: str = ""


def _id(value: Any) -> bool:
    return is_integer(value) and -(2**63) <= value < 2**63


def _file_name(value: Any) -> bool:
    try:
        return isinstance(value, str) and value != "" and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


ACCEPTED: dict[str, Callable[[Any], bool]] = {
    "an integer": is_integer,
    "an integer of 64 bits": _id,
    "from 1 to 2^31": lambda value: is_integer(value) and 1 <= value < 2**31,
    "a name that a file can have": _file_name,
    "0 or 1": lambda value: isinstance(value, int) and value in (0, 1),
    "text": lambda value: isinstance(value, str),
    "a finite number": is_number,
    "four finite numbers": lambda value: isinstance(value, list) and len(value) == 4 and all(map(is_number, value)),
}


# not pycocotools' COCO: it raises KeyError for an invalid record, without its id
class Records:
    """Records of one of the lists in a file, by id.

    Raises:
        UsageError: missing list, records without an integer id, duplicate ids.
    """

    def __init__(self, path: Path, content: Any, key: str, title: str) -> None:
        self.where = f"annotations: {path}: {title}"
        records = content.get(key) if isinstance(content, dict) else None
        if not isinstance(records, list):
            raise UsageError(f"annotations: {path} must hold a list {key!r}, as COCO's files of instances do")
        self.by_id: dict[int, dict[str, Any]] = {}
        for number, record in enumerate(records):
            if not isinstance(record, dict) or not _id(record.get("id")):
                raise UsageError(
                    f"{self.where} number {number} of the list must be a record with an id, an integer of 64 bits, got "
                    f"{record}"
                )
            if record["id"] in self.by_id:
                raise UsageError(f"{self.where} {record['id']} is there twice")
            self.by_id[record["id"]] = record

    def get(self, number: int, key: str, accepted: str, default: Any = None) -> Any:
        """Value of `key` in a record; raises UsageError if it is not as `accepted`, a key of ACCEPTED."""
        value = self.by_id[number].get(key, default)
        if value is None and key not in self.by_id[number]:
            raise UsageError(f"{self.where} {number} has no {key}")
        if not ACCEPTED[accepted](value):
            raise UsageError(f"{self.where} {number}: {key} must be {accepted}, got {value!r}")
        return value

    def known(self, number: int, key: str, others: dict[int, Any]) -> Any:
        """Look up the id stored under `key` of a record in `others`."""
        other = self.get(number, key, "an integer")
        if other not in others:
            raise UsageError(f"{self.where} {number}: {key} must be that of a record of the file, got {other}")
        return others[other]


def read_json(path: Path) -> Any:
    """Load an annotation file.

    Raises:
        UsageError: missing file, or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"annotations: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"annotations: {path} is not JSON: {error}") from error


def read_annotations(path: Path, truth: bool = False) -> Annotations:
    """Read a COCO instances file. A missing ``iscrowd`` is 0; a missing ``area`` is the area of the box.

    Args:
        truth: also return the data set for pycocotools.

    Raises:
        UsageError: missing or invalid file; the message has the id of the invalid record.
    """
    content = read_json(path)
    found = Records(path, content, "categories", "category")
    categories = {number: found.get(number, "name", "text") for number in sorted(found.by_id)}
    images = Records(path, content, "images", "image")
    if not categories or not images.by_id:
        raise UsageError(f"annotations: {path} must have images and categories")
    names = [os.fsencode(images.get(number, "file_name", "a name that a file can have")) for number in images.by_id]
    sizes = [[images.get(number, side, "from 1 to 2^31") for side in ("height", "width")] for number in images.by_id]
    objects = Records(path, content, "annotations", "annotation")
    root = _root(found, objects)
    if root is not None:
        root = categories.pop(root)
    label_of = {number: label for label, number in enumerate(categories)}
    place_of = {number: place for place, number in enumerate(images.by_id)}
    rows, where, labels, crowd, areas = [], [], [], [], []
    for number in objects.by_id:
        where.append(objects.known(number, "image_id", place_of))
        labels.append(objects.known(number, "category_id", label_of))
        rows.append(objects.get(number, "bbox", "four finite numbers"))
        crowd.append(objects.get(number, "iscrowd", "0 or 1", 0))
        areas.append(objects.get(number, "area", "a finite number", rows[-1][2] * rows[-1][3]))
    shapes = np.array(sizes, np.int64)
    said = _arrays(list(images.by_id), names, shapes, categories, rows, where, labels, crowd, areas if truth else [])
    return replace(said, root=root or "")


def _root(categories: Records, objects: Records) -> int | None:
    """Id of a category that is the supercategory of all others and has no objects, as written by Roboflow, or None.

    Such a category is not a class.
    """
    for number, record in categories.by_id.items():
        others = [other for other in categories.by_id.values() if other is not record]
        above = others and all(other.get("supercategory") == record.get("name") for other in others)
        if above and record.get("supercategory") in (None, "", "none"):
            used = any(one.get("category_id") == number for one in objects.by_id.values())
            return None if used else number
    return None


def _arrays(
    ids: list[int], names: list[bytes], sizes: np.ndarray, categories: dict[int, str], rows: list[list[float]],
    where: list[int], labels: list[int], crowd: list[int], areas: list[float],
) -> Annotations:  # fmt: skip
    """Sort boxes by image, clip them to the images and drop those without area. `rows` are (x, y, w, h)."""
    numbers = list(categories)
    truth: dict[str, Any] = {}
    if areas:
        # ids start at 1: pycocotools treats a match with id 0 as no match
        truth = {
            "images": [{"id": number} for number in ids],
            "categories": [{"id": number, "name": name} for number, name in categories.items()],
            "annotations": [
                {"id": i, "image_id": ids[w], "category_id": numbers[n], "bbox": box, "area": area, "iscrowd": int(c)}
                for i, (w, n, box, area, c) in enumerate(zip(where, labels, rows, areas, crowd, strict=True), 1)
            ],
        }
    boxes = np.array(rows, np.float64).reshape(-1, 4)
    image = np.array(where, np.int64)
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), 1)
    corners = corners.clip(0, np.tile(sizes[image, ::-1], 2)).astype(np.float32)
    kept = (corners[:, 2:] > corners[:, :2]).all(1)
    order = np.flatnonzero(kept)[np.argsort(image[kept], kind="stable")]
    counts = np.bincount(image[order], minlength=len(ids))
    return Annotations(
        ids=np.array(ids, np.int64), names=np.array(names), sizes=sizes, boxes=corners[order],
        labels=np.array(labels, np.int64)[order], crowd=np.array(crowd, bool)[order],
        bounds=np.concatenate(([0], counts.cumsum())), categories=categories, dropped=int((~kept).sum()), truth=truth,
    )  # fmt: skip


def check_category_ids(card: Card) -> None:
    """Raise UsageError if the card has no class ids."""
    if not card.class_ids:
        raise UsageError("json-format: coco needs weights that say the ids of COCO's categories, as train writes them")


def image_ids(images: Sequence[str], annotations: str | Path = "") -> dict[str, int]:
    """COCO image ids of image files, by path.

    Without `annotations`, the id is the number in the file name, as in ``000000000139.jpg`` and
    ``COCO_val2014_000000000139.jpg``. With `annotations`, a COCO JSON file, it is the id of the record whose
    ``file_name`` is a suffix of the path; the longest if there are several.

    Raises:
        UsageError: an image without an id, duplicate ids, or an invalid `annotations` file.
    """
    known = _by_file_name(Path(annotations)) if annotations else None
    ids: dict[str, int] = {}
    images_of: dict[int, str] = {}
    for image in images:
        if known is None:
            found = _number(Path(image).stem)
            if found is None:
                raise UsageError(
                    f"json-format: coco needs the number of each image: name it as in 000000000139.jpg, or give a file "
                    f"of COCO's JSON with --annotations; got {image}"
                )
        else:
            parts = Path(os.path.abspath(image)).parts
            ends = ("/".join(parts[start:]) for start in range(len(parts)))
            found = next((known[end] for end in ends if end in known), None)
            if found is None:
                raise UsageError(f"annotations: {annotations} must have all images by their file_name, got {image}")
        if found in images_of:
            raise UsageError(f"json-format: {images_of[found]} and {image} would both be COCO's image {found}")
        ids[image], images_of[found] = found, image
    return ids


def _number(stem: str) -> int | None:
    match = re.fullmatch(r"(?:COCO_[a-z]+\d{4}_)?([0-9]{1,18})", stem)
    return int(match[1]) if match else None


def _by_file_name(path: Path) -> dict[str, int]:
    records = Records(path, read_json(path), "images", "image")
    found: dict[str, int] = {}
    for number in records.by_id:
        name = records.get(number, "file_name", "a name that a file can have")
        name = os.path.normpath(name)
        if name in found:
            raise UsageError(f"annotations: {path}: images {found[name]} and {number} have the same file_name {name}")
        found[name] = number
    return found


def coco_results(
    results: Sequence[Mapping[str, Any]], ids: Mapping[str, int], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Convert results of ``predict`` to COCO's results format, skipping images with an error.

    Args:
        ids: image ids by path.
        category_ids: category ids in the order of the classes.
    """
    return [
        {
            "image_id": ids[result["image"]], "category_id": category_ids[of_it["index"]], "score": of_it["score"],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
        }
        for result in results
        for of_it in result.get("objects", ())
        for x0, y0, x1, y1 in [of_it["box"]]
    ]  # fmt: skip
