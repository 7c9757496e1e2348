"""Card of weights: describes their model and its preprocessing, stored as JSON in the metadata of the file."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from xformer.checks import is_integer, is_number
from xformer.errors import UsageError
from xformer.files import to_json
from xformer.registry import MEAN, STD, default_cfgs


@dataclass
class Card:
    """Description of a model and its preprocessing.

    model: name of one of our models or of timm's. options: model arguments other than ``num_classes`` and ``in_chans``.
    image_size, crop_pct, interpolation, mean, std: preprocessing, as in timm. classes: names in the order of logits.
    class_ids: ids of the classes in label files, which may differ from the logit indices. colours: RGB of the classes,
    if the label files specify it. step: number of optimizer steps. metrics: of the evaluation at that step.
    """

    model: str
    num_classes: int
    task: str = "classify"
    options: dict[str, Any] = field(default_factory=dict)
    in_chans: int = 3
    image_size: int = 256
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    classes: list[str] = field(default_factory=list)
    class_ids: list[int] = field(default_factory=list)
    colours: list[tuple[int, int, int]] = field(default_factory=list)
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        return to_json(asdict(self))

    def preparation(self) -> str:
        """Description of the preprocessing, for messages."""
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        normalised = f"less mean {mean}, by std {std}"
        if self.task == "classify":
            return f"{self.image_size} pixels by {self.interpolation}, crop_pct {self.crop_pct:g}, {normalised}"
        return f"{self.image_size} pixels, {normalised}" if self.task == "detect" else f"any size, {normalised}"


def _list(value: Any, accepted: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(accepted, value))


def _text(value: Any) -> bool:
    return isinstance(value, str)


ACCEPTED: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "text": (_text, ("model", "task", "interpolation")),
    "an integer of 1 or more": (lambda v: is_integer(v) and v >= 1, ("num_classes", "in_chans", "image_size")),
    "an integer of 0 or more": (lambda v: is_integer(v) and v >= 0, ("step",)),
    "a number above 0": (lambda v: is_number(v) and v > 0, ("crop_pct",)),
    "a list of finite numbers": (lambda v: _list(v, is_number) and v, ("mean",)),
    "a list of numbers above 0": (lambda v: _list(v, lambda x: is_number(x) and x > 0) and v, ("std",)),
    "a list of names": (lambda v: _list(v, _text), ("classes",)),
    "a list of integers": (lambda v: _list(v, is_integer), ("class_ids",)),
    "a list of three bytes each": (
        lambda v: _list(v, lambda c: _list(c, lambda x: is_integer(x) and 0 <= x < 256) and len(c) == 3),
        ("colours",),
    ),
    "values by name": (lambda v: isinstance(v, dict), ("options", "metrics")),
}  # fmt: skip
"""Checks of a card's fields, by their description in error messages."""


def read_card(text: str, path: object) -> Card:
    """Read a card from JSON; unknown fields are ignored.

    Raises:
        UsageError: not a valid card; the message names the file and the field.
    """
    where = f"weights: the card of {path}"
    try:
        said = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON: {error}") from error
    if not isinstance(said, dict):
        raise UsageError(f"{where} must hold fields by name, got {type(said).__name__}")
    missing = next((name for name in ("model", "num_classes") if name not in said), None)
    if missing is not None:
        raise UsageError(f"{where} has no {missing}")
    for accepted, (right, names) in ACCEPTED.items():
        for name in names:
            if name in said and not right(said[name]):
                raise UsageError(f"{where}: {name} must be {accepted}, got {said[name]!r}")
    card = Card(**{entry.name: said[entry.name] for entry in fields(Card) if entry.name in said})
    for name in ("mean", "std"):
        if card.in_chans == 3 != len(getattr(card, name)):
            raise UsageError(f"{where}: {name} must be three numbers for three channels, got {getattr(card, name)}")
    for name in ("classes", "class_ids", "colours"):
        if len(getattr(card, name)) not in (0, card.num_classes):
            raise UsageError(f"{where}: there are {len(getattr(card, name))} {name} of {card.num_classes} classes")
    return card


FREE = ("drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "img_size", "form")
"""Options that do not change the function of the weights in inference, except for rounding."""


def difference(own: Card, other: Card) -> str:
    """Message about the first difference between the models of two cards; empty if weights are compatible.

    If the tasks differ, only the options of the backbones are compared.
    """
    if own.model != other.model:
        return f"it is of {other.model}, and the model is {own.model}"
    defaults, theirs = _defaults(own), _defaults(other)
    shared = own.task == other.task
    for name in sorted(own.options.keys() | other.options.keys()):
        if name in FREE or not (shared or name in _backbone()):
            continue
        values = own.options.get(name, defaults.get(name)), other.options.get(name, theirs.get(name))
        mine, its = (json.loads(json.dumps(value, default=repr)) for value in values)  # tuples become lists
        if mine != its:
            return f"its {name} is {its!r}, and the model's {mine!r}"
    return ""


def _backbone() -> dict[str, Any]:
    from xformer.backbone import Trunk

    return _signature(Trunk)


def _defaults(card: Card) -> dict[str, Any]:
    """Default options of our models; empty for timm's models."""
    if card.model not in default_cfgs:
        return {}
    if card.task == "segment":
        from xformer.segmentation import Segmenter

        return _backbone() | _signature(Segmenter)
    if card.task == "detect":
        from xformer.detection import Detector

        return _backbone() | _signature(Detector)
    from xformer.backbone import XFormer

    return _backbone() | _signature(XFormer)


def _signature(of_it: Any) -> dict[str, Any]:
    parameters = inspect.signature(of_it).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
