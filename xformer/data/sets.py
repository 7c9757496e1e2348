"""A data set for the engine, of any task: sources of training and evaluation, and which batches of them come when."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from xformer.data.images import Skipped
from xformer.data.loader import Batch, Batches, Loader, Prepare, Source
from xformer.data.order import Shard, augmentation_seeds, permutation, positions, size_of
from xformer.errors import UsageError
from xformer.recipe import Recipe

STRETCH = 100
"""Images after an unreadable one that may stand in for it."""


class Indexed(ABC):
    """A source of `count` items 0, 1, ..., of which the next ones stand in for what cannot be read."""

    count: int

    @abstractmethod
    def digest(self) -> str:
        """Of the list of samples and what is said of them, not of the folder that they are in nor of pixels."""

    def __len__(self) -> int:
        return self.count

    def others(self, batch: Batch, index: int) -> Iterable[int]:
        first = batch.items[index]
        return ((first + step) % len(self) for step in range(1, min(STRETCH, len(self))))


class Countable(Source, Protocol):
    def __len__(self) -> int: ...
    def digest(self) -> str: ...


@dataclass
class Content:
    """One kind of data, opened.

    train, held_out: sources of images; train is None where weights are evaluated. train_batches: (epoch, start) to the
    batches of this process. eval_batches: to those of its share. samples: digests of the lists of samples, by what they
    are of.
    """

    train: Source | None
    held_out: Source
    train_batches: Callable[[int, int], Iterator[Batch]]
    eval_batches: Callable[[], Iterator[Batch]]
    train_images: int
    eval_images: int
    samples: dict[str, str]


def indexed(recipe: Recipe, shard: Shard, train: Countable | None, held_out: Countable, eval_batch: int = 0) -> Content:
    """Of sources whose items are numbers from 0 on: a new order for every epoch, evaluation in theirs.

    `eval_batch`: images at a time in evaluation, if not those of training.
    """

    def train_batches(epoch: int, start: int) -> Iterator[Batch]:
        assert train is not None
        order = permutation(len(train), recipe.seed, epoch)
        for index in range(start, len(train) // (recipe.batch_size * shard.world)):
            where = positions(index, recipe.batch_size, shard)
            items = order[where.start : where.stop].tolist()
            size = size_of(sizes(recipe), recipe.seed, epoch, index)
            yield Batch(items, size, augmentation_seeds(recipe.seed, epoch, where), [])

    def eval_batches() -> Iterator[Batch]:
        share, together = range(shard.rank, len(held_out), shard.world), eval_batch or recipe.batch_size
        for first in range(0, len(share), together):
            yield Batch(list(share[first : first + together]), recipe.image_size, [], [])

    samples = {"evaluation": held_out.digest()} | ({} if train is None else {"training": train.digest()})
    count = 0 if train is None else len(train)
    return Content(train, held_out, train_batches, eval_batches, count, len(held_out), samples)


def sizes(recipe: Recipe) -> list[int]:
    """Of training images."""
    return recipe.sizes or [recipe.image_size]


class DataSet:
    """Batches for one of the data-parallel processes.

    train_images, eval_images: of the whole data set. batches_per_epoch: micro-batches of an epoch, the same number for
    all processes. skipped: what could not be read so far. samples: digests of what is learned from.

    Raises:
        UsageError: settings that do not work, too few images for one batch.
    """

    def __init__(
        self,
        recipe: Recipe,
        shard: Shard,
        content: Content,
        prepare: Prepare,
        collate: Callable[[list[Any]], Any],
        skipped: Skipped,
    ) -> None:
        together = recipe.batch_size * shard.world
        if content.train is not None and content.train_images < together:
            raise UsageError(
                f"batch_size must leave one batch an epoch: there are {content.train_images} training images, and "
                f"{shard.world} x {recipe.batch_size} are taken at once"
            )
        self._content = content
        self.samples = content.samples
        self.train_images, self.eval_images = content.train_images, content.eval_images
        self.batches_per_epoch = content.train_images // together
        self.skipped = skipped
        self._train, self._evaluate = (
            Loader(Batches(source, prepare, collate), recipe.workers, skipped)
            for source in (content.train or content.held_out, content.held_out)
        )

    def train(self, epoch: int, start: int = 0) -> Iterator[tuple[Any, Any]]:
        """What is collated of micro-batches `start`, `start` + 1, ... of an epoch.

        A function of the recipe's seed, the epoch and the place in it: not of workers, nor of batches before.

        Raises:
            UsageError: no image of a long stretch can be read.
        """
        return self._train.run(self._content.train_batches(epoch, start))

    def evaluate(self) -> Iterator[tuple[Any, Any]]:
        """What is collated of this process's share: every readable image exactly once over all processes.

        Raises:
            UsageError: none of the images can be read.
        """
        return self._evaluate.run(self._content.eval_batches())

    def first_held_out(self) -> tuple[Any, Any] | None:
        """What is collated of the first readable evaluation image alone, in this process; None if it has no share.

        Raises:
            UsageError: none of the first images can be read.
        """
        return self._evaluate.first(self._content.eval_batches(), STRETCH)


def scale_of(recipe: Recipe) -> tuple[float, float]:
    """Factors of sizes in training, for tasks that do not crop by area.

    Raises:
        UsageError: not two of them above 0 in order.
    """
    if not (len(recipe.scale) == 2 and 0 < recipe.scale[0] <= recipe.scale[1]):
        raise UsageError(f"scale must be two factors above 0 in order, got {recipe.scale}")
    return recipe.scale[0], recipe.scale[1]
