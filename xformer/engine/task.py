"""Interface between the engine and the tasks."""

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
    """Batches of images and targets, determined by (seed, epoch, position)."""

    classes: list[str]
    train_images: int
    eval_images: int
    batches_per_epoch: int
    """Batches of each process; the same number in all."""

    def train(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Any]]:
        """Batches of an epoch, starting at index `start`."""

    def evaluate(self) -> Iterator[tuple[Tensor, Any]]:
        """Evaluation batches of this process: every image once over all processes."""

    def first_held_out(self) -> tuple[Tensor, Any] | None:
        """A batch of the first readable evaluation image, read in this process; None if its share is empty."""

    @property
    def skipped(self) -> Any:
        """What could not be read; its ``said()`` is a summary for the log."""

    @property
    def samples(self) -> dict[str, str]:
        """Digests of the lists of training and evaluation samples, by name."""


class Metrics(Protocol):
    """Metrics accumulated during an evaluation. ``compute`` reduces over all processes."""

    def update(self, outputs: Any, targets: Any) -> None: ...
    def compute(self) -> dict[str, float]: ...


class Task(ABC):
    """Data, model, loss and metrics of a task. The engine does everything else.

    Args:
        recipe: settings of the run.
        rank, world: rank of this process, and number of processes.
        weights: card of the weights to evaluate, if any, which specifies the preprocessing. No training images are
            opened then.

    Raises:
        UsageError: a setting that the task does not use.
    """

    name: str
    metric: str
    """Main metric of the evaluation; larger is better."""
    unused: tuple[str, ...] = ()
    """Settings that the task does not use."""
    data: Data

    def __init__(self, recipe: Recipe, rank: int = 0, world: int = 1, weights: Card | None = None) -> None:
        self.recipe = recipe
        plain = Recipe()
        for setting in self.unused:
            if getattr(recipe, setting) != getattr(plain, setting):
                raise UsageError(f"{setting} means nothing to task {self.name}, got {getattr(recipe, setting)!r}")

    def card(self) -> Card:
        """Card of the weights that the run writes."""
        recipe, options = self.recipe, dict(self.recipe.model_options)
        if recipe.attention:
            options["attention"] = recipe.attention
        return Card(
            model=recipe.model, num_classes=len(self.data.classes), task=self.name, options=options,
            image_size=recipe.image_size, crop_pct=recipe.crop_pct, interpolation=recipe.interpolation,
            classes=list(self.data.classes), **self.of_labels(),
        )  # fmt: skip

    def of_labels(self) -> dict[str, Any]:
        """Fields of the card about class ids and colours in label files."""
        return {}

    def build(self, **options: Any) -> nn.Module:
        """Build the model with newly initialised weights; `options` apply to this run only and are not in the card."""
        card = self.card()
        if self.recipe.drop_path > 0:
            options["drop_path_rate"] = self.recipe.drop_path
        if self.recipe.model in default_cfgs:
            options["img_size"] = min([self.recipe.image_size, *self.recipe.sizes])
        return build_model(replace(card, options=card.options | options))

    def mix(self, images: Tensor, targets: Any) -> tuple[Tensor, Any]:
        """Transform a training batch on the device, as in mixup."""
        return images, targets

    @abstractmethod
    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Mean loss over a batch."""

    @abstractmethod
    def metrics(self, device: Any) -> Metrics: ...


TASKS = {
    "classify": "xformer.classification:Classify",
    "segment": "xformer.segmentation.task:Segment",
    "detect": "xformer.detection.task:Detect",
}


def task_class(name: str) -> type[Task]:
    """Return the task class for the name in a recipe.

    Raises:
        UsageError: unknown task.
    """
    if name not in TASKS:
        raise UsageError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    module, _, of_it = TASKS[name].partition(":")
    found: type[Task] = getattr(import_module(module), of_it)
    return found
