"""What a task consists of, and the registry of tasks.

A task is one file: a subclass of :class:`Task`, decorated with :func:`register`. All commands find it by its name, in
recipes and on the cards of weights. Files of this folder are imported when their task is used; a task of another folder
is registered when its file is imported.
"""

from __future__ import annotations

import argparse
import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

from xformer.backbone import Trunk
from xformer.errors import UsageError
from xformer.recipes.card import Card
from xformer.recipes.data.order import SINGLE, Replica
from xformer.recipes.settings import Recipe
from xformer.registry import default_cfgs

if TYPE_CHECKING:
    from PIL import Image

Answer = tuple[dict[str, Any], "Image.Image | None"]
"""JSON-serialisable results for an image, and a picture if the task draws."""


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


class OpenData(Protocol):
    def __call__(self, recipe: Recipe, replica: Replica, weights: Card | None, /) -> Data:
        """Open the data of a run; the arguments are those of :class:`Task`."""


class Metrics(Protocol):
    """Metrics accumulated during an evaluation. ``compute`` reduces over all processes."""

    def update(self, outputs: Any, targets: Any) -> None: ...
    def compute(self) -> dict[str, float]: ...


class Option(NamedTuple):
    """An option of ``predict`` that a task adds.

    default: also determines the type, unless `keywords` has one. help: the default is appended to it.
    keywords: more arguments of ``ArgumentParser.add_argument``. needs_json: the option requires ``--json``.
    """

    default: Any
    help: str
    keywords: Mapping[str, Any] = {}
    needs_json: bool = False

    def parsed(self) -> dict[str, Any]:
        """Arguments of ``add_argument``, without the help."""
        kind: dict[str, Any] = {"type": type(self.default)}
        if isinstance(self.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        return {**kind, **self.keywords}


OUT = Option("predictions", "folder of pictures; '' for none", {"metavar": "FOLDER", "type": os.path.expanduser})
"""Option ``out`` of tasks that draw pictures."""


class Predictor(ABC):
    """Base class of the predictors of tasks; the options of the task are keyword arguments of its subclass.

    Args:
        model: model of the task, in eval mode.
        card: card of the model.
        names: class names, in the order of the class indices.
        batch_size: number of images per batch.

    Raises:
        UsageError: an option out of range.
    """

    columns: ClassVar[tuple[str, ...]]
    """Column titles of ``rows``."""
    reads: tuple[str, ...] = ()
    """Files that are read besides images and weights."""

    def __init__(self, model: nn.Module, card: Card, names: Sequence[str], batch_size: int = 1) -> None:
        if batch_size < 1:
            raise UsageError(f"batch-size must be 1 or more, got {batch_size}")
        self.model, self.card, self.names, self.batch_size = model, card, names, batch_size

    @abstractmethod
    def __call__(self, images: Sequence[Image.Image]) -> list[Answer | None]:
        """For each RGB image, JSON-serialisable results and a picture or None; None if outputs are not finite."""

    @abstractmethod
    def rows(self, found: dict[str, Any]) -> list[tuple[str, ...]]:
        """The results as rows of text."""

    def check(self, images: Sequence[str]) -> None:  # noqa: B027 (most tasks accept any)
        """Raise UsageError, before inference, if no JSON can be written for these files."""

    def to_json(self, results: Sequence[dict[str, Any]]) -> Any:
        """JSON-serialisable results of all images."""
        return results


class Task(ABC):
    """Model, data, loss, metrics and predictor of a task. The commands do everything else.

    The class describes the task; an object is the task of one run.

    Args:
        recipe: settings of the run.
        replica: rank of this process, and number of processes.
        weights: card of the weights to evaluate, if any, which specifies the preprocessing. No training images are
            opened then.

    Raises:
        UsageError: a setting that the task does not use.
    """

    name: ClassVar[str]
    """Set by :func:`register`."""
    metric: ClassVar[str]
    """Main metric of the evaluation; larger is better."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Settings that the task does not use."""
    eval_batch: ClassVar[int | None] = 1
    """Batch size of ``eval`` if none is given; None for that of the recipe."""
    resize: ClassVar[str] = "none"
    """Preprocessing of evaluation and prediction: "crop" resizes the shorter side and crops the centre, "fit" resizes
    the longer side and pads at the bottom and right, "none" keeps the size."""
    model: ClassVar[type[nn.Module]]
    """Class of our models, called as (backbone name, number of classes, in_chans=, options of the card)."""
    dataset: ClassVar[OpenData]
    """Opens ``data``; a class or a static method."""
    predictor: ClassVar[type[Predictor]]
    options: ClassVar[Mapping[str, Option]] = {}
    """Options of ``predict``: arguments of the predictor, and ``out`` if the task draws pictures."""
    data: Data

    def __init__(self, recipe: Recipe, replica: Replica = SINGLE, weights: Card | None = None) -> None:
        self.recipe = recipe
        plain = Recipe()
        for setting in self.unused:
            if getattr(recipe, setting) != getattr(plain, setting):
                raise UsageError(f"{setting} means nothing to task {self.name}, got {getattr(recipe, setting)!r}")
        self.data = self.dataset(recipe, replica, weights)

    @classmethod
    def create(cls, card: Card) -> nn.Module:
        """Create the model described by a card, with newly initialised weights.

        Raises:
            UsageError: unknown model, or options that it does not support.
        """
        check_options(card)
        try:
            return cls.model(card.model, card.num_classes, in_chans=card.in_chans, **card.options)
        except (TypeError, ValueError) as error:
            raise UsageError(f"model {card.model} of task {cls.name} does not take these options: {error}") from error

    @classmethod
    def defaults(cls, card: Card) -> dict[str, Any]:
        """Default options of the card's model; empty if it is not one of ours."""
        return backbone_defaults() | _defaults(cls.model) if card.model in default_cfgs else {}

    @classmethod
    def preprocessing(cls, card: Card) -> str:
        """Description of the card's preprocessing, for messages."""
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (card.mean, card.std))
        size = {
            "crop": f"{card.image_size} pixels by {card.interpolation}, crop_pct {card.crop_pct:g}",
            "fit": f"{card.image_size} pixels",
            "none": "any size",
        }[cls.resize]
        return f"{size}, less mean {mean}, by std {std}"

    def card(self) -> Card:
        """Card of the weights that the run writes."""
        recipe, options = self.recipe, dict(self.recipe.model_options)
        if recipe.attention:
            if options.get("attention", recipe.attention) != recipe.attention:
                both = f"attention={recipe.attention!r} and model_options attention={options['attention']!r}"
                raise UsageError(f"attention must be given once, got {both}")
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
        """Create the model of the run; `options` apply to this run only and are not in the card."""
        card = self.card()
        if self.recipe.drop_path > 0:
            options["drop_path_rate"] = self.recipe.drop_path
        if self.recipe.model in default_cfgs:
            options["img_size"] = min([self.recipe.image_size, *self.recipe.sizes])
        return self.create(replace(card, options=card.options | options))

    def mix(self, images: Tensor, targets: Any) -> tuple[Tensor, Any]:
        """Transform a training batch on the device, as in mixup."""
        return images, targets

    @abstractmethod
    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Mean loss over a batch."""

    @abstractmethod
    def metrics(self, device: Any) -> Metrics: ...


def check_options(card: Card) -> None:
    """Raise UsageError for options that are fields of the card, or that change the shape of the outputs."""
    names: tuple[str, ...] = ("num_classes", "in_chans", "features_only", "out_indices")
    wrong = [name for name in names if name in card.options]
    if card.options.get("global_pool") == "":
        wrong.append("global_pool=''")
    if wrong:
        raise UsageError(f"model_options must not have {', '.join(wrong)}: the task and the data determine the outputs")


def backbone_defaults() -> dict[str, Any]:
    """Default options of the backbones."""
    return _defaults(Trunk)


def _defaults(of_it: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(of_it).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


TASKS: dict[str, type[Task]] = {}
"""Registered tasks, by name."""
TaskClass = TypeVar("TaskClass", bound=type[Task])


def register(name: str) -> Callable[[TaskClass], TaskClass]:
    """Class decorator that registers a task by its name in recipes and on cards.

    Raises:
        ValueError: another module has registered a task with this name.
    """

    def decorator(task: TaskClass) -> TaskClass:
        other = TASKS.get(name)
        if other is not None and other.__module__ != task.__module__:
            raise ValueError(f"task {name} is registered by {other.__module__}, got another one of {task.__module__}")
        task.name = name
        TASKS[name] = task
        return task

    return decorator


def find_task(name: str) -> type[Task]:
    """Return the task with this name.

    Raises:
        UsageError: unknown task.
    """
    own = [module.name for module in iter_modules(__path__)]
    if name in own and name not in TASKS:
        import_module(f"{__name__}.{name}")
    if name not in TASKS:
        raise UsageError(f"task must be one of {', '.join(dict.fromkeys([*own, *TASKS]))}, got {name!r}")
    return TASKS[name]


def all_tasks() -> dict[str, type[Task]]:
    """All tasks by name: those of this folder, and others that are registered."""
    for module in iter_modules(__path__):
        find_task(module.name)
    return TASKS
