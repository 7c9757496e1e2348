"""Save and load weights as safetensors, with a :class:`xformer.recipes.card.Card` that describes the model.

Loading such a file executes no code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from xformer.errors import UsageError
from xformer.recipes.card import Card, read_card
from xformer.recipes.files import PART
from xformer.recipes.tasks import backbone_defaults, find_task

KEY = "xformer"
PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl")
STATISTICS = ("running_mean", "running_var")
"""Suffixes of the names of buffers that training changes."""


def build_model(card: Card) -> nn.Module:
    """Build the model described by a card, with newly initialised weights.

    Raises:
        UsageError: unknown task or model, or options that it does not support.
    """
    return find_task(card.task).create(card)


def save_weights(path: str | Path, state: Mapping[str, Tensor], card: Card) -> None:
    """Write a state dict and its card atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{PART}{path.name}")
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    try:
        part.touch()
        mode = part.stat().st_mode  # that of any new file; safetensors replaces the file by one of mode 600
        save_file(tensors, part, metadata={KEY: card.to_json()})
        part.chmod(mode)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], Card | None]:
    """Load a state dict, and its card if the file has one (None for safetensors from elsewhere).

    Raises:
        UsageError: missing file, not a safetensors file, or an invalid card.
    """
    if not Path(path).is_file():
        raise UsageError(f"weights: there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
    except (SafetensorError, OSError) as error:
        hint = ""
        if Path(path).suffix.lower() in PICKLED:
            hint = "; a state dict of torch.save becomes one by safetensors.torch.save_file(torch.load(...), ...)"
        raise UsageError(f"weights: {path} is not a safetensors file: {error}{hint}") from error
    return state, None if text is None else read_card(text, path)


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: str | Path, partial: bool = False) -> list[str]:
    """Load a state dict into a model; with `partial`, only the tensors whose name and shape match.

    Returns messages about the tensors of the file and of the model that were skipped.

    Raises:
        UsageError: different names or shapes without `partial`, no match with it; weights that are not finite.
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
    wrong = not_finite({name: state[name] for name in learned(model) if name in state})
    if wrong is not None:
        raise UsageError(f"weights: {path} is of no use: {wrong} is not finite")
    with torch.no_grad():
        model.load_state_dict({k: v for k, v in state.items() if k in own and k not in other}, strict=False)
    return said


def learned(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and running statistics, by name in the state dict."""
    statistics = {name: buffer for name, buffer in model.named_buffers() if name.endswith(STATISTICS)}
    return dict(model.named_parameters()) | statistics


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor with NaN or infinity, or None. For sharded tensors only the local shard is checked."""
    for name, value in tensors.items():
        local = value.to_local() if hasattr(value, "to_local") else value
        if not torch.isfinite(local).all():
            return name
    return None


UNCOMPARED = ("drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "zero_init_last", "img_size", "form")
"""Options that do not change the function of the weights in inference, except for rounding."""


def difference(own: Card, other: Card) -> str:
    """Message about the first difference between the models of two cards; empty if weights are compatible.

    If the tasks differ, only the options of the backbones are compared.
    """
    if own.model != other.model:
        return f"it is of {other.model}, and the model is {own.model}"
    defaults, theirs = (find_task(card.task).defaults(card) for card in (own, other))
    shared = own.task == other.task
    for name in sorted(own.options.keys() | other.options.keys()):
        if name in UNCOMPARED or not (shared or name in backbone_defaults()):
            continue
        values = own.options.get(name, defaults.get(name)), other.options.get(name, theirs.get(name))
        mine, its = (json.loads(json.dumps(value, default=repr)) for value in values)  # tuples become lists
        if mine != its:
            return f"its {name} is {its!r}, and the model's {mine!r}"
    return ""


def start_from(model: nn.Module, own: Card, path: str | Path, partial: bool = False) -> list[str]:
    """Initialise a model, whose card is `own`, with the weights of a file for training.

    Weights of the same task are loaded completely. For other tasks, those of a classifier are loaded into
    ``model.backbone``, without the head. The card says which of the two a file is; without a card, a file is a
    classifier if no name starts with ``backbone.``. With `partial`, all matching tensors of any file are loaded.

    Returns messages about what was skipped in the file and in the model; with `partial` also how the cards differ.

    Raises:
        UsageError: as :func:`load_weights`; without `partial`, weights of a different task other than classification,
            of a different model or different options, or different names or shapes.
    """
    task = own.task
    state, card = load_weights(path)
    of_classifier = card.task == "classify" if card else not any(name.startswith("backbone.") for name in state)
    into_backbone = task != "classify" and of_classifier
    if card and card.task != task and not into_backbone and not partial:
        accepted = task if task == "classify" else f"classify or {task}"
        raise UsageError(
            f"weights: {path} is of task {card.task}, and must be of {accepted}; --partial takes what fits of it"
        )
    other = difference(own, card) if card else ""
    if other and not partial:
        raise UsageError(f"weights: {path} is of another model: {other}; --partial takes what fits of it")
    if into_backbone:
        left_out = _load_backbone(model.get_submodule("backbone"), state, path, partial)
    else:
        left_out = load_state(model, state, path, partial)
    return left_out + ([f"{path} is of another model: {other}"] if other else [])


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
    """Return the model of a file in eval mode, and its card.

    `name` and `changes` (fields of a card) describe the model if the file has no card; otherwise they must agree with
    the card.

    Raises:
        UsageError: as :func:`load_weights`; a file without a card and no `name`; weights of another model, according to
            the card or to the shapes; weights that are not finite.
    """
    state, card = load_weights(path)
    bare = card is None
    if card is None:
        if not name:
            raise UsageError(f"weights: {path} does not say what it is of: name the model with --model")
        last = ("classifier.weight", "fc.weight", "head.weight")
        classes = [value.shape[0] for key, value in state.items() if key.endswith(last)]
        card = replace(Card(name, num_classes=classes[-1] if classes else 1000), **changes)
    else:
        asked = replace(card, model=name or card.model, **changes)
        asked.options = card.options | asked.options
        other = difference(asked, card)
        if other or asked.num_classes != card.num_classes:
            said = other or f"it has {card.num_classes} classes, and {asked.num_classes} are asked for"
            raise UsageError(f"weights: {path} is of another model: {said}; without options it is taken as it says")
    model = build_model(card)
    load_state(model, state, path)
    return model.eval(), replace(card, **{**preprocessing_of(model), **changes}) if bare else card


def preprocessing_of(model: nn.Module) -> dict[str, Any]:
    """Preprocessing from the model's ``pretrained_cfg`` (timm's convention), as fields of a card."""
    config = getattr(model, "pretrained_cfg", None) or {}
    said = {key: config[key] for key in ("crop_pct", "interpolation", "mean", "std") if key in config}
    return said | ({"image_size": config["input_size"][-1]} if "input_size" in config else {})
