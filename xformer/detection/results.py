"""Convert detections to COCO's results format, as read by pycocotools' ``COCO.loadRes``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xformer.detection.coco import Records, read_json
from xformer.errors import UsageError
from xformer.weights import Card


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
