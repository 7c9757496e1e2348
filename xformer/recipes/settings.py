"""Recipes: the settings of a run as a flat set, from a TOML or YAML file and the command line."""

from __future__ import annotations

import argparse
import math
import os
import sys
import types
import typing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from xformer.errors import UsageError

CONFIGS = Path(__file__).parent / "configs"


PRECISIONS = ("no", "bf16", "fp16")
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "box", "hamming", "lanczos")
"""timm's names."""
PATHS = ("data", "out", "weights", "train_shards", "eval_shards", "classes")
"""Settings in which ``~`` is expanded."""
# checks of numbers, by their description in error messages, and the settings they apply to; nan fails all
RANGES: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "1 or more": (
        lambda v: v >= 1,
        ("epochs", "batch_size", "accumulate", "image_size", "eval_every", "keep", "log_every"),
    ),
    "finite, 0 or more": (
        lambda v: 0 <= v < math.inf,
        (
            "seed", "workers", "threads", "checkpoint_every", "train_samples", "eval_samples", "color_jitter", "mixup",
            "cutmix", "min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "clip_grad",
        ),
    ),
    "finite and above 0": (lambda v: 0 < v < math.inf, ("lr",)),
    "above 0 and at most 1": (lambda v: 0 < v <= 1, ("crop_pct",)),
    "from 0 to 1": (lambda v: 0 <= v <= 1, ("hflip", "reprob", "layer_decay")),
    "from 0 to below 1": (lambda v: 0 <= v < 1, ("drop_path", "smoothing", "ema")),
    "1 or more each": (lambda v: all(size >= 1 for size in v), ("sizes",)),
}  # fmt: skip


def setting(default: Any, help: str) -> Any:
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: default.copy(), metadata={"help": help})
    return field(default=default, metadata={"help": help})


# not jsonargparse or tyro: files, options and Python have the same checks and the same one-sentence errors
@dataclass
class Recipe:
    """Settings of a run. Each is a key in recipe files and an option of the command line."""

    task: str = setting("classify", "what is learned")
    data: str = setting("", "a folder with train/ and val/ of class folders; tar shards; digits; mnist5k")
    out: str = setting("runs/classify", "folder of checkpoints and logs")
    seed: int = setting(0, "of init, order, augmentation, dropout")

    model: str = setting("xformer_xxs", "ours or timm's")
    model_options: dict[str, Any] = setting({}, "more arguments of the model, as key=value")
    attention: str = setting("", "attention of our models, by name: xfa, softmax, ...")
    drop_path: float = setting(0.0, "drop path rate of the last block")
    weights: str = setting("", "safetensors to start from; those of a classifier are a backbone to other tasks")
    partial: bool = setting(False, "take what fits of these weights, and say what was left out")

    image_size: int = setting(256, "pixels")
    sizes: list[int] = setting([], "multi-scale training: each batch has one of these sizes")
    train_samples: int = setting(0, "images of an epoch, for shards that do not say")
    eval_samples: int = setting(0, "likewise of the evaluation")
    train_shards: str = setting("", "tar shards of training (braces expand), if not *train*.tar of data")
    eval_shards: str = setting("", "likewise of evaluation, if not *val*.tar")
    classes: str = setting("", "file of class names, one a line; to segment also their ids and colours")
    workers: int = setting(2, "processes that load images")

    scale: list[float] = setting([0.08, 1.0], "share of an image's area in a random crop")
    ratio: list[float] = setting([0.75, 1.3333333], "aspect ratios of a random crop")
    hflip: float = setting(0.5, "probability of a mirror image")
    color_jitter: float = setting(0.0, "strength")
    auto_augment: str = setting("", "timm's policy, such as rand-m9-mstd0.5-inc1")
    reprob: float = setting(0.0, "probability of random erasing")
    interpolation: str = setting("bicubic", "of resized images")
    crop_pct: float = setting(1.0, "share of an image that the evaluation sees")
    mixup: float = setting(0.0, "timm's mixup alpha")
    cutmix: float = setting(0.0, "timm's cutmix alpha")
    smoothing: float = setting(0.1, "label smoothing")

    epochs: int = setting(300, "passes over the training images")
    batch_size: int = setting(128, "images of one process in one pass forward")
    accumulate: int = setting(1, "passes to one optimiser step")
    opt: str = setting("adamw", "timm's optimisers")
    lr: float = setting(2e-3, "peak learning rate")
    min_lr: float = setting(2e-5, "at the end of the cosine")
    warmup_lr: float = setting(1e-6, "at the first step")
    warmup_epochs: float = setting(5.0, "of linear warm-up")
    weight_decay: float = setting(0.05, "not of norms, biases and temperatures")
    layer_decay: float = setting(0.0, "learning rate of a layer by that of the next one; 0: the same for all")
    clip_grad: float = setting(0.0, "largest norm of gradients; 0: not clipped")
    ema: float = setting(0.0, "decay of averaged weights; 0: none")

    precision: str = setting("no", "no, bf16 or fp16")
    channels_last: bool = setting(True, "memory format of images")
    compile: bool = setting(False, "torch.compile the model")
    sync_bn: bool = setting(False, "batch statistics over all processes (GPUs only)")
    grad_checkpointing: bool = setting(False, "compute stages again in backward")
    threads: int = setting(0, "of torch on the CPU; 0: as torch decides")
    eval_every: int = setting(1, "epochs between evaluations")
    checkpoint_every: int = setting(0, "optimiser steps between checkpoints; 0: an epoch")
    keep: int = setting(2, "checkpoints that stay")
    log_every: int = setting(10, "optimiser steps between lines of the log")
    tensorboard: bool = setting(True, "write TensorBoard events beside the CSV")

    def __post_init__(self) -> None:
        for entry in fields(self):
            setattr(self, entry.name, _checked(entry.name, getattr(self, entry.name)))
        for name in PATHS:
            setattr(self, name, os.path.expanduser(getattr(self, name)))
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.interpolation not in INTERPOLATIONS:
            raise UsageError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")
        for accepted, (right, names) in RANGES.items():
            for name in names:
                if not right(getattr(self, name)):
                    raise UsageError(f"{name} must be {accepted}, got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_TYPES = typing.get_type_hints(Recipe)
WORDS: dict[Any, str] = {
    str: "text", int: "an integer", float: "a number", bool: "true or false", dict[str, Any]: "a table of settings",
    list[int]: "a list of integers", list[float]: "a list of numbers",
}  # fmt: skip


def _checked(name: str, value: Any) -> Any:
    """Convert `value` to the type of a setting; floats may be given as integers, lists as tuples."""
    kind = typing.get_origin(_TYPES[name]) or _TYPES[name]
    if kind is float and isinstance(value, str):  # YAML parses 2e-3 as a string
        with suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is list and isinstance(value, (list, tuple)):
        (inner,) = typing.get_args(_TYPES[name])
        if all(isinstance(v, (int, float) if inner is float else inner) for v in value):
            return [inner(v) for v in value]
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise UsageError(f"{name} must be {WORDS[_TYPES[name]]}, got {value!r}")


def load_recipe(path: str | Path = "", changes: dict[str, Any] | None = None) -> Recipe:
    """Load a recipe file (``.toml``, ``.yaml``, or the name of one in ``xformer/recipes/configs``) and apply changes.

    Tables in a file only group keys, except for ``model_options``, which is a setting.

    Raises:
        UsageError: missing file, unknown or duplicate setting, wrong type of a value, or a file that does not parse.
    """
    settings: dict[str, Any] = {}
    if path:
        for key, value in _parse(_find(path)).items():
            inner = value if isinstance(value, dict) and key not in _TYPES else {key: value}
            twice = sorted(inner.keys() & settings.keys())
            if twice:
                raise UsageError(f"{path}: there are two settings {twice[0]}, in different tables")
            settings.update(inner)
    unknown = sorted(settings.keys() - _TYPES.keys())
    if unknown:
        raise UsageError(f"{path}: there is no setting {', '.join(unknown)}")
    recipe = Recipe(**settings)
    return replace(recipe, **(changes or {}))


def _find(path: str | Path) -> Path:
    found = next(
        (p for p in (Path(path).expanduser(), CONFIGS / f"{path}", CONFIGS / f"{path}.toml") if p.is_file()), None
    )
    if found is None:
        names = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.toml")))
        raise UsageError(f"there is no recipe {path}: give a .toml or .yaml file, or one of {names}")
    return found


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix in (".yaml", ".yml"):
            import yaml

            parsed = yaml.safe_load(text) or {}
        else:
            parsed = _toml().loads(text)
    except Exception as error:  # each parser has its own exceptions
        raise UsageError(f"{path} does not parse: {error}") from error
    if not isinstance(parsed, dict):
        raise UsageError(f"{path} must hold settings by name, got {type(parsed).__name__}")
    return parsed


def _toml() -> types.ModuleType:
    if sys.version_info >= (3, 11):
        import tomllib as toml
    else:
        import tomli as toml
    return toml


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting; options not given are absent from the parsed namespace."""
    plain = Recipe()
    for entry in fields(Recipe):
        kind = typing.get_origin(_TYPES[entry.name]) or _TYPES[entry.name]
        said = help_text(entry.metadata["help"], getattr(plain, entry.name))
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": said}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is dict:
            options |= {"nargs": "*", "metavar": "KEY=VALUE"}
        elif kind is list:
            options |= {"nargs": "+", "type": typing.get_args(_TYPES[entry.name])[0]}
        else:
            options["type"] = kind
        parser.add_argument(f"--{entry.name.replace('_', '-')}", **options)


def help_text(help: str, default: Any) -> str:
    """Help of an option, with its default."""
    shown = "none" if default in ("", [], {}, None) else default
    if isinstance(shown, list):
        shown = " ".join(map(str, shown))
    elif isinstance(shown, bool):
        shown = "yes" if shown else "no"
    return f"{help} (default: {shown})".replace("%", "%%")


def from_options(path: str, options: argparse.Namespace) -> Recipe:
    """Load a recipe file and apply the settings given on the command line."""
    changes = {key: value for key, value in vars(options).items() if key in _TYPES}
    if changes.get("model_options"):  # given without pairs: empty, not the recipe's
        changes["model_options"] = {**load_recipe(path).model_options, **pairs(changes["model_options"])}
    elif "model_options" in changes:
        changes["model_options"] = {}
    return load_recipe(path, changes)


def pairs(given: list[str]) -> dict[str, Any]:
    """Parse ``key=value`` pairs; values are TOML, True or False, or strings if they are none of these."""
    result: dict[str, Any] = {}
    for pair in given:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"model-options must be KEY=VALUE, got {pair!r}")
        try:
            result[key] = _toml().loads(f"value = {text.lower() if text in ('True', 'False') else text}")["value"]
        except ValueError:
            result[key] = text
    return result
