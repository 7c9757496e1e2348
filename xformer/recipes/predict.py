"""Run inference on images: ``python -m xformer predict image.jpg --weights w.safetensors``.

The task is given by the weights' card. This module has what tasks share: reading images, and writing text, JSON and
pictures. Inference of each task is the ``predictor`` in its file.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from xformer.errors import UsageError
from xformer.fuse import fuse_for_inference
from xformer.recipes.card import Card
from xformer.recipes.data.files import read_names
from xformer.recipes.data.images import TURNED, Unreadable, open_image
from xformer.recipes.files import make_folder, write_json
from xformer.recipes.pictures import check_files, find_images, picture_paths, write_picture
from xformer.recipes.settings import help_text
from xformer.recipes.tasks import Predictor, all_tasks, find_task
from xformer.recipes.weights import load_model

NOT_FINITE = "what the model says of it is not finite: the weights are damaged, or the image is unlike any other"


@dataclass
class Prediction:
    """Prediction for an image: JSON-serialisable results and, if the task draws, a picture; or an error message."""

    image: str
    error: str = ""
    found: dict[str, Any] = field(default_factory=dict)
    drawn: Image.Image | None = None


def predict(predictor: Predictor, images: Sequence[str | Path]) -> Iterator[Prediction]:
    """Yield a prediction for each image file, in order, with the preprocessing of the evaluation."""
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
        names = read_names("labels", labels)
    if len(names) != card.num_classes:
        raise UsageError(
            f"labels: {labels or 'the card'} has {len(names)} names, the model has {card.num_classes} classes"
        )
    return names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print what a model says of images, and draw it. The weights say what the task is. Options of one task are "
        "refused with another."
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="files that PIL reads, folders of images, patterns such as '*.jpg'"
    )
    parser.add_argument("--weights", required=True, help="safetensors")
    parser.add_argument("--model", default="", help="what they are of, where the file does not say")
    parser.add_argument("--labels", default="", help="class names, one a line; default: those in the weights file")
    parser.add_argument("--json", default="", help="also write the results here")
    for name, tasks in task_options().items():
        texts: dict[str, list[str]] = {}
        for task in tasks:
            option = find_task(task).options[name]
            texts.setdefault(help_text(option.help, option.default), []).append(task)
        said = "; ".join(f"{', '.join(names)}: {text}" for text, names in texts.items())
        parser.add_argument(f"--{name.replace('_', '-')}", default=None, help=said, **option.parsed())


def task_options() -> dict[str, list[str]]:
    """Options of all tasks, with the names of the tasks that have them.

    Raises:
        ValueError: two tasks parse an option differently.
    """
    tasks = all_tasks()
    found: dict[str, list[str]] = {}
    for task in sorted(tasks):
        for name, option in tasks[task].options.items():
            found.setdefault(name, []).append(task)
            first = found[name][0]
            if option.parsed() != tasks[first].options[name].parsed():
                raise ValueError(f"option {name} must be parsed alike by the tasks {first} and {task}")
    return found


def run(options: argparse.Namespace) -> int:
    """Print and write predictions; returns 1 if any image has an error."""
    for name in ("weights", "labels", "json"):
        setattr(options, name, os.path.expanduser(getattr(options, name)))
    images = find_images([os.path.expanduser(image) for image in options.images])
    model, card = load_model(options.weights, options.model)
    if card.in_chans != 3:
        raise UsageError(f"weights: {options.weights} must be of RGB images, got one of {card.in_chans} channels")
    task = find_task(card.task)
    given = {name: value for name in task_options() if (value := getattr(options, name)) is not None}
    for name, value in given.items():
        if name not in task.options:
            raise UsageError(f"{name.replace('_', '-')} means nothing to task {card.task}, got {value!r}")
        if task.options[name].needs_json and not options.json:
            raise UsageError(f"{name.replace('_', '-')} needs --json FILE, got {value!r} without it")
    settings = {name: option.default for name, option in task.options.items()} | given
    out = settings.pop("out", "")
    predictor = task.predictor(fuse_for_inference(model), card, class_names(card, options.labels), **settings)
    there = [image for image in images if Path(image).is_file()]
    predictor.check(there)
    pictures = dict(zip(there, picture_paths(out, there), strict=True)) if out else {}
    check_files(pictures, options.json, (*images, options.weights, options.labels, *predictor.reads))
    if out:
        for folder in dict.fromkeys([Path(out), *(picture.parent for picture in pictures.values())]):
            make_folder("out", folder)
    print(f"{options.weights}: {card.model}, images of {task.preprocessing(card)}")
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
