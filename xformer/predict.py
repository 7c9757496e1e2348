"""What a model says of images: ``python -m xformer predict image.jpg --weights w.safetensors``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xformer.errors import UsageError
from xformer.files import write_json
from xformer.fuse import fuse_for_inference
from xformer.weights import Card, load_model


@dataclass
class Guess:
    name: str
    index: int
    probability: float


@dataclass
class Prediction:
    """The likeliest classes of an image, best first; or why it could not be read."""

    image: str
    top: list[Guess] = field(default_factory=list)
    error: str = ""


def predict(
    model: nn.Module, card: Card, images: Sequence[str | Path], names: Sequence[str], top: int = 5, batch: int = 32
) -> Iterator[Prediction]:
    """One prediction for every image, in their order, prepared as in the evaluation. `names` are of the classes."""
    from xformer.data.images import Unreadable, open_image
    from xformer.data.transforms import eval_transform

    transform = eval_transform(card, card.mean, card.std)
    for start in range(0, len(images), batch):
        results = [Prediction(str(path)) for path in images[start : start + batch]]
        read: list[tuple[Prediction, Tensor]] = []
        for result in results:
            if not Path(result.image).is_file():
                result.error = f"image: there is no file {result.image}"
                continue
            try:
                read.append((result, transform(open_image(result.image))))
            except Unreadable as error:
                result.error = f"image: {result.image} cannot be read: {error}"
        if read:
            with torch.inference_mode():
                logits = model(torch.stack([image for _, image in read]))
            best = logits.float().softmax(-1).topk(min(top, card.num_classes))
            for (result, _), values, indices in zip(read, best.values.tolist(), best.indices.tolist(), strict=True):
                result.top = [Guess(names[i], i, p) for p, i in zip(values, indices, strict=True)]
        yield from results


def class_names(card: Card, labels: str | Path = "") -> list[str]:
    """Names in the order of logits: of the file `labels` (one a line), else the card's, else their numbers.

    Raises:
        UsageError: no such file, or not as many names as classes.
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
        "predict", help="classes of images", description="Print the likeliest classes of images."
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files that PIL reads")
    parser.add_argument("--weights", required=True, help="safetensors")
    parser.add_argument("--model", default="", help="what they are of, where the file does not say")
    parser.add_argument("--labels", default="", help="class names, one a line; default: those in the weights file")
    parser.add_argument("--top", type=int, default=5, help="classes to print (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images at a time (default: %(default)s)")
    parser.add_argument("--json", default="", help="also write the results here")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print predictions; 1 if an image could not be read."""
    for name in ("top", "batch_size"):
        if getattr(options, name) < 1:
            raise UsageError(f"{name.replace('_', '-')} must be 1 or more, got {getattr(options, name)}")
    model, card = load_model(options.weights, options.model, task="classify")
    if card.in_chans != 3:
        raise UsageError(f"weights: {options.weights} must be of RGB images, got one of {card.in_chans} channels")
    names = class_names(card, options.labels)
    results = []
    for result in predict(fuse_for_inference(model), card, options.images, names, options.top, options.batch_size):
        results.append(result)
        if result.error:
            print(f"error: {result.error}", file=sys.stderr)
        else:
            show(result)
    if options.json:
        write_json("json", options.json, [asdict(result) for result in results])
    return int(any(result.error for result in results))


def show(result: Prediction) -> None:
    """A table on a terminal where rich is installed, else lines of probability and name."""
    try:
        if not sys.stdout.isatty():
            raise ImportError
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        print(result.image)
        for guess in result.top:
            print(f"  {guess.probability:7.2%}  {guess.name}")
        return
    table = Table("class", "probability", title=escape(result.image), title_justify="left")
    for guess in result.top:
        table.add_row(escape(guess.name), f"{guess.probability:.2%}")
    Console().print(table)
