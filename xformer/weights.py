"""Weights as files: safetensors, with a card of what they are weights of.

The card is JSON in the file's metadata: the model by its name and options, its classes, and how images are to be
prepared. Nothing in such a file is code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from xformer.errors import UsageError
from xformer.files import PART
from xformer.registry import MEAN, STD, build, default_cfgs

KEY = "xformer"


@dataclass
class Card:
    """What weights are of, and what the model wants to see.

    model: a name of ours or timm's. options: its arguments, without ``num_classes`` and ``in_chans``. image_size,
    crop_pct, interpolation, mean, std: how an image is prepared (timm's terms). classes: names in the order of logits.
    category_ids: COCO's, in the same order, of a detector. step: optimiser steps done. metrics: of the evaluation at
    that step.
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
    category_ids: list[int] = field(default_factory=list)
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


def create_model(name: str, num_classes: int, in_chans: int = 3, **options: Any) -> nn.Module:
    """One of ours, or of timm's where timm is installed.

    Raises:
        UsageError: a model that neither has, or options that it does not take.
    """
    try:
        if name in default_cfgs:
            return build(name, num_classes=num_classes, in_chans=in_chans, **options)
        import timm

        if timm.is_model(name):
            model: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **options)
            return model
    except (TypeError, ValueError) as error:
        raise UsageError(f"model {name} does not take these options: {error}") from error
    raise UsageError(f"model must be one of {', '.join(default_cfgs)} or a name of timm.list_models(), got {name!r}")


def build_model(card: Card) -> nn.Module:
    """What a card says, with fresh weights.

    Raises:
        UsageError: a task or model that there is not, or options that it does not take.
    """
    if card.task == "classify":
        return create_model(card.model, card.num_classes, card.in_chans, **card.options)
    if card.task == "segment":
        from xformer.segmentation import Segmenter

        try:
            return Segmenter(card.model, card.num_classes, in_chans=card.in_chans, **card.options)
        except (TypeError, ValueError) as error:
            raise UsageError(f"model {card.model} cannot segment with these options: {error}") from error
    if card.task == "detect":
        from xformer.detection import Detector

        try:
            return Detector(card.model, card.num_classes, in_chans=card.in_chans, **card.options)
        except (TypeError, ValueError) as error:
            raise UsageError(f"model {card.model} cannot detect with these options: {error}") from error
    raise UsageError(f"task must be classify, segment or detect, got {card.task!r}")


def save_weights(path: str | Path, state: Mapping[str, Tensor], card: Card) -> None:
    """Write a state dict and its card, atomically: a file of this name is always a whole one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{PART}{path.name}")
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    try:
        save_file(tensors, part, metadata={KEY: json.dumps(asdict(card))})
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], Card | None]:
    """A state dict, and its card if the file has one (other people's safetensors have not).

    Raises:
        UsageError: no such file, or not a safetensors file.
    """
    if not Path(path).is_file():
        raise UsageError(f"weights: there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"weights: {path} is not a safetensors file: {error}") from error
    if text is None:
        return state, None
    known = {entry.name for entry in fields(Card)}
    return state, Card(**{key: value for key, value in json.loads(text).items() if key in known})


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: str | Path, partial: bool = False) -> list[str]:
    """Put a state dict into a model; with `partial`, what fits of it.

    Returns what was left out, of the file and of the model, as sentences.

    Raises:
        UsageError: names or shapes that differ, without `partial`.
    """
    own = model.state_dict()
    other = {name: value.shape for name, value in state.items() if name in own and own[name].shape != value.shape}
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    said = [f"{name} is {tuple(own[name].shape)} here and {tuple(shape)} there" for name, shape in other.items()]
    said += [f"{len(names)} {what}, such as {names[0]}" for names, what in (
        (missing, "tensors of the model are not there"), (unexpected, "tensors there are not of the model")
    ) if names]  # fmt: skip
    if said and not partial:
        raise UsageError(f"weights: {path} is not of this model: {'; '.join(said[:3])}")
    if said and not (state.keys() & own.keys()) - other.keys():
        raise UsageError(f"weights: nothing in {path} fits this model: {'; '.join(said[:3])}")
    with torch.no_grad():
        model.load_state_dict({k: v for k, v in state.items() if k in own and k not in other}, strict=False)
    return said


def start_from(model: nn.Module, task: str, path: str | Path, partial: bool = False) -> list[str]:
    """Put the weights of a file into a model of "classify", "segment" or "detect", to be trained from there.

    A file of the same task loads whole. A classifier's goes into ``model.backbone`` of the other tasks, without its
    head. Which of the two a file is says its card; without one, its names: a classifier's do not begin with
    ``backbone.``. With `partial`, what fits is taken of any file.

    Returns what was left out, of the file and of the model, as sentences.

    Raises:
        UsageError: as :func:`load_weights`; without `partial` weights of another task, one that is no classifier, or
            names or shapes that differ.
    """
    state, card = load_weights(path)
    of_classifier = card.task == "classify" if card else not any(name.startswith("backbone.") for name in state)
    if task != "classify" and of_classifier:
        return _load_backbone(model.get_submodule("backbone"), state, path, partial)
    if card and card.task != task and not partial:
        accepted = task if task == "classify" else f"classify or {task}"
        raise UsageError(
            f"weights: {path} is of task {card.task}, and must be of {accepted}; --partial takes what fits of it"
        )
    return load_state(model, state, path, partial)


def _load_backbone(backbone: nn.Module, state: Mapping[str, Tensor], path: str | Path, partial: bool) -> list[str]:
    own = backbone.state_dict()
    other = [name for name, value in own.items() if name not in state or state[name].shape != value.shape]
    if other and not partial:
        raise UsageError(
            f"weights: {path} must have the {len(own)} tensors of the backbone, got {len(own) - len(other)} of them, "
            f"without {other[0]}"
        )
    return load_state(backbone, state, path, partial=True)


def load_model(path: str | Path, name: str = "", **changes: Any) -> tuple[nn.Module, Card]:
    """The model of a file in eval mode, and its card. `name` and `changes` (of a card) where the file has none.

    Raises:
        UsageError: as :func:`load_weights`; a file without a card and no `name`; weights of another model, by what the
            card says or by their shapes.
    """
    state, card = load_weights(path)
    bare = card is None
    if card is None:
        if not name:
            raise UsageError(f"weights: {path} does not say what it is of: name the model with --model")
        last = ("classifier.weight", "fc.weight", "head.weight")
        classes = [value.shape[0] for key, value in state.items() if key.endswith(last)]
        card = Card(name, num_classes=classes[-1] if classes else 1000)
    elif name and name != card.model:
        raise UsageError(f"model: {path} is of {card.model}, got {name}; without --model it is taken as what it says")
    card = replace(card, **changes)
    model = build_model(card)
    load_state(model, state, path)
    return model.eval(), replace(card, **{**preparation(model), **changes}) if bare else card


def preparation(model: nn.Module) -> dict[str, Any]:
    """What a model's own configuration (timm's) says of images, as fields of a card."""
    config = getattr(model, "pretrained_cfg", None) or {}
    said = {key: config[key] for key in ("crop_pct", "interpolation", "mean", "std") if key in config}
    return said | ({"image_size": config["input_size"][-1]} if "input_size" in config else {})
