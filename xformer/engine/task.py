"""What the engine has to know of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor, nn

from xformer.errors import UsageError
from xformer.recipe import Recipe
from xformer.weights import Card


class Data(Protocol):
    """Batches of images and targets. The same (seed, epoch, position) is the same batch, whenever it is asked for."""

    train_images: int
    eval_images: int
    batches_per_epoch: int
    """Of one process; the same number in all."""

    def train(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Any]]:
        """Batches of an epoch from number `start` on."""

    def evaluate(self) -> Iterator[tuple[Tensor, Any]]:
        """This process's share: every image once over all of them."""

    @property
    def skipped(self) -> Any:
        """Images that could not be read: ``count`` and ``names``."""


class Metrics(Protocol):
    """What an evaluation adds up. ``compute`` is over all processes."""

    def update(self, outputs: Any, targets: Any) -> None: ...
    def compute(self) -> dict[str, float]: ...


class Task(ABC):
    """Data, model, loss and metrics. Everything else of a run is the engine's.

    Args:
        recipe: the settings of the run.
        rank, world: number of this process, and how many there are.
    """

    metric: str
    """Of an evaluation: the larger, the better."""
    data: Data

    def __init__(self, recipe: Recipe, rank: int = 0, world: int = 1) -> None:
        self.recipe = recipe

    @abstractmethod
    def card(self) -> Card:
        """Of the weights that the run writes."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The model, with fresh weights."""

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
