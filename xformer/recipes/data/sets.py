"""Data sets of any task: training and evaluation sources, and the order of their batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from xformer.errors import UsageError
from xformer.recipes.data.images import Skipped
from xformer.recipes.data.loader import Batch, Batches, Loader, SampleTransform, Source
from xformer.recipes.data.order import Replica, augmentation_seeds, permutation, positions, size_of
from xformer.recipes.settings import Recipe

STRETCH = 100
"""Number of following images that may replace an unreadable one."""


class Indexed(ABC):
    """A source of `count` items 0, 1, ...; unreadable items are replaced by the following ones."""

    count: int

    @abstractmethod
    def digest(self) -> str:
        """Digest of the list of samples and their targets; does not depend on the root folder, nor on pixels."""

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
    """An opened data set.

    train, held_out: image sources; train is None when evaluating weights. train_batches: (epoch, start) to the training
    batches of this process. eval_batches: returns the evaluation batches of this process. samples: digests of the lists
    of samples, by name ("training", "evaluation").
    """

    train: Source | None
    held_out: Source
    train_batches: Callable[[int, int], Iterator[Batch]]
    eval_batches: Callable[[], Iterator[Batch]]
    train_images: int
    eval_images: int
    samples: dict[str, str]


def indexed(
    recipe: Recipe, replica: Replica, train: Countable | None, held_out: Countable, eval_batch: int = 0
) -> Content:
    """Content from indexed sources: training in a new order each epoch, evaluation in the order of the source.

    `eval_batch`: batch size in evaluation; 0 for that of training.
    """

    def train_batches(epoch: int, start: int) -> Iterator[Batch]:
        assert train is not None
        order = permutation(len(train), recipe.seed, epoch)
        for index in range(start, len(train) // (recipe.batch_size * replica.world)):
            where = positions(index, recipe.batch_size, replica)
            items = order[where.start : where.stop].tolist()
            size = size_of(sizes(recipe), recipe.seed, epoch, index)
            yield Batch(items, size, augmentation_seeds(recipe.seed, epoch, where), [])

    def eval_batches() -> Iterator[Batch]:
        share, together = range(replica.rank, len(held_out), replica.world), eval_batch or recipe.batch_size
        for first in range(0, len(share), together):
            yield Batch(list(share[first : first + together]), recipe.image_size, [], [])

    samples = {"evaluation": held_out.digest()} | ({} if train is None else {"training": train.digest()})
    count = 0 if train is None else len(train)
    return Content(train, held_out, train_batches, eval_batches, count, len(held_out), samples)


def sizes(recipe: Recipe) -> list[int]:
    """Sizes of training images."""
    return recipe.sizes or [recipe.image_size]


class DataSet:
    """Batches for one of the data-parallel processes.

    train_images, eval_images: numbers for the whole data set. batches_per_epoch: micro-batches per epoch, the same for
    all processes. skipped: unreadable images so far. samples: digests of the lists of samples.

    Raises:
        UsageError: invalid settings, or too few images for one batch.
    """

    def __init__(
        self,
        recipe: Recipe,
        replica: Replica,
        content: Content,
        prepare: SampleTransform,
        collate: Callable[[list[Any]], Any],
        skipped: Skipped,
    ) -> None:
        together = recipe.batch_size * replica.world
        if content.train is not None and content.train_images < together:
            raise UsageError(
                f"batch_size must leave one batch an epoch: there are {content.train_images} training images, and "
                f"{replica.world} x {recipe.batch_size} are taken at once"
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
        """Yield the collated micro-batches `start`, `start` + 1, ... of an epoch.

        They depend only on the recipe's seed, the epoch and the position: not on workers, nor on previous batches.

        Raises:
            UsageError: an image and all of its replacements are unreadable.
        """
        return self._train.run(self._content.train_batches(epoch, start))

    def evaluate(self) -> Iterator[tuple[Any, Any]]:
        """Yield the evaluation batches of this process: every readable image exactly once over all processes.

        Raises:
            UsageError: no image can be read.
        """
        return self._evaluate.run(self._content.eval_batches())

    def first_held_out(self) -> tuple[Any, Any] | None:
        """Return a batch of the first readable evaluation image, read in this process; None if its share is empty.

        Raises:
            UsageError: none of the first STRETCH images can be read.
        """
        return self._evaluate.first(self._content.eval_batches(), STRETCH)


def scale_of(recipe: Recipe) -> tuple[float, float]:
    """Range of the random resize factor in training, for tasks that do not crop by area.

    Raises:
        UsageError: not two increasing factors above 0.
    """
    if not (len(recipe.scale) == 2 and 0 < recipe.scale[0] <= recipe.scale[1]):
        raise UsageError(f"scale must be two factors above 0 in order, got {recipe.scale}")
    return recipe.scale[0], recipe.scale[1]
