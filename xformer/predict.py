"""Run inference on images: ``python -m xformer predict image.jpg --weights w.safetensors``.

The task is given by the weights' card. This module has what tasks share: reading images, and writing text, JSON and
pictures. Inference of each task is in its folder: ``classification/predict.py`` and so on.
"""

from __future__ import annotations

import argparse
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from xformer.errors import UsageError
from xformer.files import make_folder, write_json
from xformer.fuse import fuse_for_inference
from xformer.inputs import find_images
from xformer.pictures import check_files, picture_paths, write_picture
from xformer.weights import Card, load_model

if TYPE_CHECKING:
    from PIL import Image


NOT_FINITE = "what the model says of it is not finite: the weights are damaged, or the image is unlike any other"
Answer = tuple[dict[str, Any], "Image.Image | None"]


@dataclass
class Prediction:
    """Prediction for an image: JSON-serialisable results and, if the task draws, a picture; or an error message."""

    image: str
    error: str = ""
    found: dict[str, Any] = field(default_factory=dict)
    drawn: Image.Image | None = None


class Predictor(ABC):
    """Base class of the predictors of tasks.

    Args:
        model: model of the task, in eval mode.
        card: card of the model.
        names: class names, in the order of the class indices.
        batch_size: number of images per batch.

    Raises:
        UsageError: an option out of range.
    """

    defaults: ClassVar[dict[str, Any]]
    """Options of the command that the task uses, with defaults. A task that draws pictures has ``out``."""
    columns: ClassVar[tuple[str, ...]]
    """Column titles of ``rows``."""

    def __init__(self, model: nn.Module, card: Card, names: Sequence[str], batch_size: int = 1) -> None:
        if batch_size < 1:
            raise UsageError(f"batch-size must be 1 or more, got {batch_size}")
        self.model, self.card, self.names, self.batch_size = model, card, names, batch_size

    @abstractmethod
    def __call__(self, images: Sequence[Image.Image]) -> list[Answer | None]:
        """For each RGB image, JSON-serialisable results and a picture or None; None if outputs are not finite."""

    @abstractmethod
    def rows(self, found: dict[str, Any]) -> list[tuple[str, ...]]:
        """The results as rows of text."""

    def check(self, images: Sequence[str]) -> None:  # noqa: B027 (most tasks accept any)
        """Raise UsageError, before inference, if no JSON can be written for these files."""

    def to_json(self, results: Sequence[dict[str, Any]]) -> Any:
        """JSON-serialisable results of all images."""
        return results


TASKS = {
    "classify": "xformer.classification.predict:Classes",
    "segment": "xformer.segmentation.predict:Pixels",
    "detect": "xformer.detection.predict:Boxes",
}


def predictor_class(task: str) -> type[Predictor]:
    """Return the predictor class for a task."""
    module, _, name = TASKS[task].partition(":")
    found: type[Predictor] = getattr(import_module(module), name)
    return found


def predict(predictor: Predictor, images: Sequence[str | Path]) -> Iterator[Prediction]:
    """Yield a prediction for each image file, in order, with the preprocessing of the evaluation."""
    from xformer.data.images import TURNED, Unreadable, open_image

    for start in range(0, len(images), predictor.batch_size):
        results = [Prediction(str(path)) for path in images[start : start + predictor.batch_size]]
        read: list[tuple[Prediction, Image.Image]] = []
        for result in results:
            if not Path(result.image).is_file():
                result.error = f"image: there is no file {result.image}"
                continue
            try:
                read.append((result, open_image(result.image)))
            except Unreadable as error:
                result.error = f"image: {result.image} cannot be read: {error}"
        if read:
            with torch.inference_mode():
                answers = _answers(predictor, [image for _, image in read])
            for (result, image), answer in zip(read, answers, strict=True):
                if isinstance(answer, Unreadable):
                    result.error = f"image: {result.image} cannot be read: {answer}"
                elif answer is None:
                    result.error = f"image: {result.image}: {NOT_FINITE}"
                else:
                    result.found, result.drawn = answer
                    if "width" in result.found and image.info[TURNED] != 1:
                        result.found["exif_orientation"] = image.info[TURNED]
        yield from results


def _answers(predictor: Predictor, images: Sequence[Image.Image]) -> list[Any]:
    """Answers for all images; an :class:`Unreadable` error for images that cannot be preprocessed."""
    from xformer.data.images import Unreadable

    try:
        return predictor(images)
    except Unreadable as error:  # for one of the images: retry them one by one
        return [error] if len(images) == 1 else [answer for image in images for answer in _answers(predictor, [image])]


def class_names(card: Card, labels: str | Path = "") -> list[str]:
    """Class names in the order of logits: from the file `labels` (one per line), else the card, else the indices.

    Raises:
        UsageError: missing file, or the number of names is not the number of classes.
    """
    names = card.classes or [str(i) for i in range(card.num_classes)]
    if labels:
        from xformer.data.files import read_names

        names = read_names("labels", labels)
    if len(names) != card.num_classes:
        raise UsageError(
            f"labels: {labels or 'the card'} has {len(names)} names, the model has {card.num_classes} classes"
        )
    return names


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "predict",
        help="classes, objects or segments of images",
        description="Print what a model says of images, and draw it. The weights say what the task is: classify, "
        "detect or segment. Options of one task are refused with another.",
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="files that PIL reads, folders of images, patterns such as '*.jpg'"
    )
    parser.add_argument("--weights", required=True, help="safetensors")
    parser.add_argument("--model", default="", help="what they are of, where the file does not say")
    parser.add_argument("--labels", default="", help="class names, one a line; default: those in the weights file")
    parser.add_argument("--json", default="", help="also write the results here")
    parser.add_argument(
        "--out", metavar="FOLDER", help="detect, segment: of pictures; '' for none (default: predictions)"
    )
    parser.add_argument(
        "--batch-size", type=int, help="classify, detect: images at a time (default: 32 to classify, 8 to detect)"
    )
    parser.add_argument("--top", type=int, help="classify: classes to print (default: 5)")
    parser.add_argument("--score", type=float, help="detect: what is not above it is left out (default: 0.3)")
    parser.add_argument(
        "--iou", type=float, help="detect: of two boxes of a class that overlap more the better stays (default: 0.45)"
    )
    parser.add_argument(
        "--window", nargs=2, type=int, metavar=("H", "W"), help="segment: by windows (default: the whole image at once)"
    )
    parser.add_argument(
        "--stride", nargs=2, type=int, metavar=("H", "W"), help="segment: of windows (default: three quarters of them)"
    )
    parser.add_argument(
        "--legend",
        action=argparse.BooleanOptionalAction,
        help="segment: below each picture, the colours of its classes (default: yes)",
    )
    parser.add_argument(
        "--json-format",
        metavar="FORMAT",
        help="detect: plain, or coco for a list that pycocotools loads (default: plain)",
    )
    parser.add_argument(
        "--annotations", metavar="FILE", help="detect: COCO's JSON with the numbers of images (default: in their names)"
    )
    parser.set_defaults(run=run)


OF_TASKS = ("out", "batch_size", "top", "score", "iou", "window", "stride", "legend", "json_format", "annotations")


def run(options: argparse.Namespace) -> int:
    """Print and write predictions; returns 1 if any image has an error."""
    for name in ("weights", "labels", "json", "out", "annotations"):
        if value := getattr(options, name):
            setattr(options, name, os.path.expanduser(value))
    images = find_images([os.path.expanduser(image) for image in options.images])
    model, card = load_model(options.weights, options.model)
    if card.in_chans != 3:
        raise UsageError(f"weights: {options.weights} must be of RGB images, got one of {card.in_chans} channels")
    kind = predictor_class(card.task)
    given = {name: value for name in OF_TASKS if (value := getattr(options, name)) is not None}
    for name, value in given.items():
        if name not in kind.defaults:
            raise UsageError(f"{name.replace('_', '-')} means nothing to task {card.task}, got {value!r}")
        if name in ("json_format", "annotations") and not options.json:
            raise UsageError(f"{name.replace('_', '-')} needs --json FILE, got {value!r} without it")
    settings = kind.defaults | given
    out = settings.pop("out", "")
    predictor = kind(fuse_for_inference(model), card, class_names(card, options.labels), **settings)
    there = [image for image in images if Path(image).is_file()]
    predictor.check(there)
    pictures = dict(zip(there, picture_paths(out, there), strict=True)) if out else {}
    check_files(pictures, options.json, (*images, options.weights, options.labels, options.annotations or ""))
    if out:
        for folder in dict.fromkeys([Path(out), *(picture.parent for picture in pictures.values())]):
            make_folder("out", folder)
    print(f"{options.weights}: {card.model}, images of {card.preparation()}")
    results = []
    for result in predict(predictor, images):
        results.append({"image": result.image, "error": result.error, **result.found})
        if result.error:
            print(f"error: {result.error}", file=sys.stderr)
            continue
        title = result.image
        if result.drawn is not None and result.image in pictures:
            picture = pictures[result.image]
            results[-1]["picture"] = str(picture)
            title = f"{title} -> {picture}"
            write_picture(picture, result.drawn)
        show(title, predictor.columns, predictor.rows(result.found))
    if options.json:
        write_json("json", options.json, predictor.to_json(results))
    return int(any(result["error"] for result in results))


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table if stdout is a terminal and rich is installed, else plain lines."""
    try:
        if not sys.stdout.isatty():
            raise ImportError
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        print(title)
        for row in rows:
            print("  " + "  ".join(row))
        return
    table = Table(*columns, title=escape(title), title_justify="left")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)
