"""What the engine has to know of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor, nn

from xformer.card import Card
from xformer.errors import UsageError
from xformer.recipe import Recipe
from xformer.registry import default_cfgs
from xformer.weights import build_model


class Data(Protocol):
    """Batches of images and targets. The same (seed, epoch, position) is the same batch, whenever it is asked for."""

    classes: list[str]
    train_images: int
    eval_images: int
    batches_per_epoch: int
    """Of one process; the same number in all."""

    def train(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Any]]:
        """Batches of an epoch from number `start` on."""

    def evaluate(self) -> Iterator[tuple[Tensor, Any]]:
        """This process's share: every image once over all of them."""

    def first_held_out(self) -> tuple[Tensor, Any] | None:
        """A batch of the first readable evaluation image, read in this process; None if its share is empty."""

    @property
    def skipped(self) -> Any:
        """What could not be read: ``said()`` for the log."""

    @property
    def samples(self) -> dict[str, str]:
        """What a run learns from and is judged by: digests of the lists of samples, by what they are of."""


class Metrics(Protocol):
    """What an evaluation adds up. ``compute`` is over all processes."""

    def update(self, outputs: Any, targets: Any) -> None: ...
    def compute(self) -> dict[str, float]: ...


class Task(ABC):
    """Data, model, loss and metrics. Everything else of a run is the engine's.

    Args:
        recipe: the settings of the run.
        rank, world: number of this process, and how many there are.
        weights: the card of what is evaluated, which says how images are prepared. No training images are opened then.

    Raises:
        UsageError: a setting that means nothing to the task.
    """

    name: str
    metric: str
    """Of an evaluation: the larger, the better."""
    unused: tuple[str, ...] = ()
    """Settings that mean nothing here."""
    data: Data

    def __init__(self, recipe: Recipe, rank: int = 0, world: int = 1, weights: Card | None = None) -> None:
        self.recipe = recipe
        plain = Recipe()
        for setting in self.unused:
            if getattr(recipe, setting) != getattr(plain, setting):
                raise UsageError(f"{setting} means nothing to task {self.name}, got {getattr(recipe, setting)!r}")

    def card(self) -> Card:
        """Of the weights that the run writes."""
        recipe, options = self.recipe, dict(self.recipe.model_options)
        if recipe.attention:
            options["attention"] = recipe.attention
        return Card(
            model=recipe.model, num_classes=len(self.data.classes), task=self.name, options=options,
            image_size=recipe.image_size, crop_pct=recipe.crop_pct, interpolation=recipe.interpolation,
            classes=list(self.data.classes), **self.of_labels(),
        )  # fmt: skip

    def of_labels(self) -> dict[str, Any]:
        """What files of labels say of the classes, as fields of the card."""
        return {}

    def build(self, **options: Any) -> nn.Module:
        """The model, with fresh weights; `options` of this run alone, which are not the card's."""
        card = self.card()
        if self.recipe.drop_path > 0:
            options["drop_path_rate"] = self.recipe.drop_path
        if self.recipe.model in default_cfgs:
            options["img_size"] = min([self.recipe.image_size, *self.recipe.sizes])
        return build_model(replace(card, options=card.options | options))

    def mix(self, images: Tensor, targets: Any) -> tuple[Tensor, Any]:
        """What is done to training batches as a whole, on the device."""
        return images, targets

    @abstractmethod
    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The mean over a batch."""

    @abstractmethod
    def metrics(self, device: Any) -> Metrics: ...


TASKS = {
    "classify": "xformer.classification:Classify",
    "segment": "xformer.segmentation.task:Segment",
    "detect": "xformer.detection.task:Detect",
}


def task_class(name: str) -> type[Task]:
    """By the name of a recipe.

    Raises:
        UsageError: a task that there is not.
    """
    if name not in TASKS:
        raise UsageError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    module, _, of_it = TASKS[name].partition(":")
    found: type[Task] = getattr(import_module(module), of_it)
    return found
