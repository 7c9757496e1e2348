"""Classification data: open what a recipe's `data` names, and make batches of images and labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xformer.errors import UsageError
from xformer.recipes.card import Card
from xformer.recipes.data import files, shards, tars
from xformer.recipes.data.images import Skipped
from xformer.recipes.data.loader import Batch
from xformer.recipes.data.order import SINGLE, Replica, digest
from xformer.recipes.data.sets import Content, DataSet, indexed, sizes
from xformer.recipes.data.transforms import Statistics, Transform, eval_transform, train_transform
from xformer.recipes.settings import Recipe
from xformer.registry import MEAN, STD


@dataclass
class Classes:
    """Class names and pixel statistics of a data set."""

    names: list[str]
    mean: Statistics = MEAN
    std: Statistics = STD


@dataclass
class ClassifyTransform:
    """Image and label to (tensor, label), with one training transform per image size and one for evaluation."""

    evaluation: Transform
    training: dict[int, Transform]

    def __call__(self, image: Image.Image, label: int, size: int, training: bool) -> tuple[Tensor, int]:
        return (self.training[size] if training else self.evaluation)(image), label


def collate(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Stack to (B, 3, S, S) float32 and (B,) int64."""
    return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])


class ClassificationData(DataSet):
    """Batches of images (B, 3, S, S) float32 and labels (B,) int64.

    classes: names in the order of logits. mean, std: for normalisation. transform: the evaluation transform.
    """

    in_chans = 3

    def __init__(self, recipe: Recipe, replica: Replica, content: Content, classes: Classes, skipped: Skipped) -> None:
        self.classes, self.mean, self.std = classes.names, classes.mean, classes.std
        self.transform = eval_transform(recipe, self.mean, self.std)
        training = {size: train_transform(recipe, size, self.mean, self.std) for size in sizes(recipe)}
        super().__init__(recipe, replica, content, ClassifyTransform(self.transform, training), collate, skipped)


def open_data(recipe: Recipe, replica: Replica = SINGLE, weights: Card | None = None) -> ClassificationData:
    """Open the data named by `recipe.data`, for one of the data-parallel processes.

    `weights`: card of the weights to evaluate. Training images are then not required, and pixels are normalised with
    the statistics of the card.

    Raises:
        UsageError: unknown data, missing or invalid files, too few images for one batch, or only one class.
    """
    skipped = Skipped()
    content, classes = _open(recipe, replica, skipped, weights)
    if weights is not None:
        classes = Classes(classes.names, weights.mean, weights.std)
    elif len(classes.names) < 2:
        found = f"{len(classes.names)}: {', '.join(classes.names)}"
        raise UsageError(f"data: {recipe.data} must have two classes or more, got {found}")
    return ClassificationData(recipe, replica, content, classes, skipped)


def _open(recipe: Recipe, replica: Replica, skipped: Skipped, weights: Card | None) -> tuple[Content, Classes]:
    root = Path(recipe.data)
    if recipe.data in files.SAMPLES:
        return _indexed(recipe, replica, *files.open_samples(recipe.data))
    evaluated = weights is not None and recipe.eval_shards
    if recipe.train_shards or evaluated or recipe.data.endswith(".tar") or tars.is_remote(recipe.data):
        return _streamed(recipe, replica, skipped, weights)
    if not recipe.data or not root.is_dir():
        samples = ", ".join(files.SAMPLES)
        raise UsageError(f"data must be {samples}, a folder that exists or tar shards, got {recipe.data!r}")
    if not (root / "train").is_dir() and any(root.glob("*.tar")):
        return _streamed(recipe, replica, skipped, weights)
    if weights is None:
        return _indexed(recipe, replica, *files.open_folders(root, replica))
    names = weights.classes or [str(label) for label in range(weights.num_classes)]
    held_out = files.open_evaluation(root, replica, [] if recipe.classes else weights.classes, len(names))
    return _indexed(recipe, replica, None, held_out, names)


def _indexed(
    recipe: Recipe,
    replica: Replica,
    train: files.Files | files.Arrays | None,
    held_out: files.Files | files.Arrays,
    classes: list[str],
    statistics: tuple[Statistics, Statistics] = (MEAN, STD),
) -> tuple[Content, Classes]:
    names = files.read_names("classes", recipe.classes) if recipe.classes else classes
    if len(names) != len(classes):
        raise UsageError(
            f"classes: {recipe.classes} must name the {len(classes)} classes of the data, got {len(names)}"
        )
    return indexed(recipe, replica, train, held_out), Classes(names, *statistics)


def _streamed(recipe: Recipe, replica: Replica, skipped: Skipped, weights: Card | None) -> tuple[Content, Classes]:
    """Open shards. Numbers of samples and classes come from the recipe, else from files beside them, or are counted."""
    train_pattern, eval_pattern, root = recipe.train_shards, recipe.eval_shards, recipe.data
    if recipe.data.endswith(".tar"):
        root = ""
        if weights is None:
            train_pattern = train_pattern or recipe.data
        else:
            eval_pattern = eval_pattern or recipe.data
    names = files.read_names("classes", recipe.classes) if recipe.classes else []
    urls: list[str] = []
    if weights is None:
        urls = tars.find_shards("train_shards", train_pattern or "*train*.tar", root)
    held_out_urls = tars.find_shards("eval_shards", eval_pattern or "*val*.tar", root)
    if weights is None:
        train_images, labels = _known("train_samples", recipe.train_samples, urls, bool(names), replica)
    else:
        names = names or weights.classes
        train_images, labels = 0, weights.num_classes
    eval_images, _ = _known("eval_samples", recipe.eval_samples, held_out_urls, True, replica)
    if names and labels > len(names):
        raise UsageError(
            f"classes: {recipe.classes} must name {labels} classes, as labels go to {labels - 1}, got {len(names)}"
        )
    names = names or [str(label) for label in range(labels)]

    def stream(urls: list[str], pixels: list[int]) -> shards.Stream:
        return shards.Stream(urls, len(names), replica, recipe.batch_size, pixels, recipe.seed, skipped)

    held_out = stream(held_out_urls, [recipe.image_size])
    train = stream(urls, sizes(recipe)) if urls else None
    batches = train_images // (recipe.batch_size * replica.world)

    def train_batches(epoch: int, start: int) -> Iterator[Batch]:
        assert train is not None
        return train.train_batches(epoch, start, batches)

    source = shards.Samples()
    samples = {
        part: digest([url.rpartition("/")[2] for url in of_it], np.array(images))
        for part, of_it, images in (("training", urls, train_images), ("evaluation", held_out_urls, eval_images))
        if of_it
    }
    content = Content(
        source if urls else None, source, train_batches, held_out.eval_batches, train_images, eval_images, samples
    )  # fmt: skip
    return content, Classes(names)


def _known(setting: str, given: int, urls: list[str], named: bool, replica: Replica) -> tuple[int, int]:
    """Number of samples in shards, and number of classes according to their labels (0 if labels were not read).

    Raises:
        UsageError: shards are not local, and the settings do not give the numbers.
    """
    local = not any(tars.is_remote(url) for url in urls)
    samples = given or (tars.said_sizes(urls) if local else None)
    if samples and named:
        return samples, 0
    if not local:
        missing = setting if not samples else "classes"
        raise UsageError(f"{missing} must be given for shards that are not local files, such as {urls[0]}")
    counted, labels, wrong = tars.count_samples(urls, replica)
    if not counted:
        raise UsageError(shards.no_samples(len(urls), wrong or urls[0]))
    return samples or counted, labels
