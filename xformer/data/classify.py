"""Images and their classes: what a recipe's `data` is, and batches of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from xformer.data import files
from xformer.data.images import Skipped
from xformer.data.loader import Batch, Batches, Loader, Source
from xformer.data.order import Shard
from xformer.data.transforms import Statistics, Transform, eval_transform, train_transform
from xformer.errors import UsageError
from xformer.recipe import Recipe

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class Content:
    """One kind of data, opened: sources of images, batches of their items, and what is known of them.

    train_batches: (epoch, start) to the batches of this process. eval_batches: to those of its share.
    """

    train: Source
    held_out: Source
    train_batches: Callable[[int, int], Iterator[Batch]]
    eval_batches: Callable[[], Iterator[Batch]]
    train_images: int
    eval_images: int
    classes: list[str]
    mean: Statistics = IMAGENET_MEAN
    std: Statistics = IMAGENET_STD


@dataclass
class Prepare:
    """Image and label to (tensor, label): one transform for each size of training, and that of evaluation."""

    recipe: Recipe
    mean: Statistics
    std: Statistics
    transform: Transform
    training: dict[int, Transform] = field(default_factory=dict)

    def __call__(self, image: Image.Image, label: int, size: int, training: bool) -> tuple[Tensor, int]:
        if not training:
            return self.transform(image), label
        return self.training[size](image), label


def collate(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """(B, 3, S, S) float32 and (B,) int64."""
    return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])


class Data:
    """Batches of images and labels, for one of the data-parallel processes.

    classes: names in the order of logits. train_images, eval_images: of the whole data set. batches_per_epoch:
    micro-batches of an epoch, the same number for all processes. mean, std: of normalised channels. transform: that
    of evaluation. skipped: unreadable images so far.
    """

    in_chans = 3

    def __init__(self, recipe: Recipe, shard: Shard, content: Content, skipped: Skipped) -> None:
        together = recipe.batch_size * shard.world
        if content.train_images < together:
            raise UsageError(
                f"batch_size must leave one batch an epoch: there are {content.train_images} training images, and "
                f"{shard.world} x {recipe.batch_size} are taken at once"
            )
        self._content = content
        self.classes, self.mean, self.std = content.classes, content.mean, content.std
        self.train_images, self.eval_images = content.train_images, content.eval_images
        self.batches_per_epoch = content.train_images // together
        self.transform = eval_transform(recipe, self.mean, self.std)
        self.skipped = skipped
        training = {size: train_transform(recipe, size, self.mean, self.std) for size in _sizes(recipe)}
        prepare = Prepare(recipe, self.mean, self.std, self.transform, training)
        self._train = Loader(Batches(content.train, prepare, collate), recipe.workers, skipped)
        self._evaluate = Loader(Batches(content.held_out, prepare, collate), recipe.workers, skipped)

    def train(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, 3, S, S) float32 and labels (B,) int64 of micro-batches `start`, `start` + 1, ... of an epoch.

        A function of the recipe's seed, the epoch and the place in it: not of workers, nor of batches before.

        Raises:
            UsageError: no image of a long stretch can be read.
        """
        return self._train.run(self._content.train_batches(epoch, start))

    def evaluate(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of this process's share: every readable image exactly once over all processes.

        Raises:
            UsageError: none of the images can be read.
        """
        return self._evaluate.run(self._content.eval_batches())


def open_data(recipe: Recipe, shard: Shard | None = None) -> Data:
    """The data that `recipe.data` names, as one of the data-parallel processes sees it.

    Raises:
        UsageError: no such data, files that are missing or wrong, or too few images for one batch.
    """
    shard = shard or Shard()
    if recipe.workers < 0:
        raise UsageError(f"workers must be 0 or more, got {recipe.workers}")
    if any(size < 1 for size in recipe.sizes):
        raise UsageError(f"sizes must be 1 or more, got {recipe.sizes}")
    skipped = Skipped()
    return Data(recipe, shard, _open(recipe, shard), skipped)


def _open(recipe: Recipe, shard: Shard) -> Content:
    train: files.Indexed
    held_out: files.Indexed
    statistics: dict[str, Statistics] = {}
    if recipe.data in files.SAMPLES:
        train, held_out, classes, (mean, std) = files.open_samples(recipe.data)
        statistics = {"mean": (mean,) * 3, "std": (std,) * 3}
    elif recipe.data and Path(recipe.data).is_dir():
        train, held_out, classes = files.open_folders(Path(recipe.data))
    else:
        names = ", ".join(files.SAMPLES)
        raise UsageError(f"data must be {names} or a folder that exists, got {recipe.data!r}")
    return _indexed(recipe, shard, train, held_out, classes, **statistics)


def _indexed(
    recipe: Recipe, shard: Shard, train: Any, held_out: Any, classes: list[str], **statistics: Statistics
) -> Content:
    def train_batches(epoch: int, start: int) -> Iterator[Batch]:
        return files.train_batches(len(train), recipe.batch_size, _sizes(recipe), recipe.seed, epoch, start, shard)

    def eval_batches() -> Iterator[Batch]:
        return files.eval_batches(len(held_out), recipe.batch_size, recipe.image_size, shard)

    return Content(train, held_out, train_batches, eval_batches, len(train), len(held_out), classes, **statistics)


def _sizes(recipe: Recipe) -> list[int]:
    return recipe.sizes or [recipe.image_size]
