"""Card of weights: describes their model and its preprocessing, stored as JSON in the metadata of the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from xformer.errors import UsageError
from xformer.recipes.files import is_integer, is_number, to_json
from xformer.registry import MEAN, STD


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
