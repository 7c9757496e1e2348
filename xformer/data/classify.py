"""Images and their classes: what a recipe's `data` is, and batches of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from xformer.data import files, shards, tars
from xformer.data.images import Skipped
from xformer.data.loader import Batch, Batches, Loader, Source
from xformer.data.order import Shard
from xformer.data.transforms import Statistics, Transform, eval_transform, train_transform
from xformer.errors import UsageError
from xformer.recipe import Recipe

IMAGENET: tuple[Statistics, Statistics] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of channels."""


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
    mean: Statistics = IMAGENET[0]
    std: Statistics = IMAGENET[1]


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
    return Data(recipe, shard, _open(recipe, shard, skipped), skipped)


def _open(recipe: Recipe, shard: Shard, skipped: Skipped) -> Content:
    root = Path(recipe.data)
    if recipe.data in files.SAMPLES:
        return _indexed(recipe, shard, *files.open_samples(recipe.data))
    if recipe.train_shards or recipe.data.endswith(".tar") or tars.is_remote(recipe.data):
        return _streamed(recipe, shard, skipped)
    if not recipe.data or not root.is_dir():
        names = ", ".join(files.SAMPLES)
        raise UsageError(f"data must be {names}, a folder that exists or tar shards, got {recipe.data!r}")
    if not (root / "train").is_dir() and any(root.glob("*.tar")):
        return _streamed(recipe, shard, skipped)
    return _indexed(recipe, shard, *files.open_folders(root))


def _indexed(
    recipe: Recipe,
    shard: Shard,
    train: files.Files | files.Arrays,
    held_out: files.Files | files.Arrays,
    classes: list[str],
    statistics: tuple[Statistics, Statistics] = IMAGENET,
) -> Content:
    names = _names(recipe.classes) if recipe.classes else classes
    if len(names) != len(classes):
        raise UsageError(
            f"classes: {recipe.classes} must name the {len(classes)} classes of the data, got {len(names)}"
        )

    def train_batches(epoch: int, start: int) -> Iterator[Batch]:
        return files.train_batches(len(train), recipe.batch_size, _sizes(recipe), recipe.seed, epoch, start, shard)

    def eval_batches() -> Iterator[Batch]:
        return files.eval_batches(len(held_out), recipe.batch_size, recipe.image_size, shard)

    return Content(train, held_out, train_batches, eval_batches, len(train), len(held_out), names, *statistics)


def _streamed(recipe: Recipe, shard: Shard, skipped: Skipped) -> Content:
    """Numbers of samples are those of the recipe, or said beside the shards, or counted; likewise classes."""
    train_pattern, root = recipe.train_shards, recipe.data
    if recipe.data.endswith(".tar"):
        train_pattern, root = train_pattern or recipe.data, ""
    urls = tars.find_shards("train_shards", train_pattern or "*train*.tar", root)
    held_out_urls = tars.find_shards("eval_shards", recipe.eval_shards or "*val*.tar", root)
    names = _names(recipe.classes) if recipe.classes else []
    train_images, labels = _known("train_samples", recipe.train_samples, urls, bool(names))
    eval_images, _ = _known("eval_samples", recipe.eval_samples, held_out_urls, True)
    if names and labels > len(names):
        raise UsageError(
            f"classes: {recipe.classes} must name {labels} classes, as labels go to {labels - 1}, got {len(names)}"
        )
    names = names or [str(label) for label in range(labels)]

    def stream(urls: list[str], sizes: list[int]) -> shards.Stream:
        return shards.Stream(urls, len(names), shard, recipe.batch_size, sizes, recipe.seed, skipped)

    train, held_out = stream(urls, _sizes(recipe)), stream(held_out_urls, [recipe.image_size])
    batches = train_images // (recipe.batch_size * shard.world)

    def train_batches(epoch: int, start: int) -> Iterator[Batch]:
        return train.train_batches(epoch, start, batches)

    source = shards.Samples()
    return Content(source, source, train_batches, held_out.eval_batches, train_images, eval_images, names)


def _known(setting: str, given: int, urls: list[str], named: bool) -> tuple[int, int]:
    """Samples of shards, and the classes that their labels show (0 if they were not looked at).

    Raises:
        UsageError: shards that are not local, of which the settings do not say enough.
    """
    local = not any(tars.is_remote(url) for url in urls)
    samples = given or (tars.said_sizes(urls) if local else None)
    if samples and named:
        return samples, 0
    if not local:
        missing = setting if not samples else "classes"
        raise UsageError(f"{missing} must be given for shards that are not local files, such as {urls[0]}")
    counted, labels = tars.count_samples(urls)
    if not counted:
        raise UsageError(f"data: none of {len(urls)} shards has images with labels, such as {urls[0]}")
    return samples or counted, labels


def _names(path: str) -> list[str]:
    try:
        return [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"classes must be a file of class names, one a line, got {path}: {error}") from error


def _sizes(recipe: Recipe) -> list[int]:
    return recipe.sizes or [recipe.image_size]
