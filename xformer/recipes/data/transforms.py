"""Create timm's transforms from the settings of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image, ImageOps
from torch import Tensor

from xformer.errors import UsageError
from xformer.recipes.data.images import check_resized
from xformer.recipes.settings import Recipe
from xformer.registry import MEAN, STD

Transform = Callable[[Image.Image], Tensor]
Statistics = tuple[float, ...]


def to_tensor(image: Image.Image, mean: Statistics = MEAN, std: Statistics = STD) -> Tensor:
    """Convert an RGB image to (3, H, W) float32, normalised."""
    from torchvision.transforms.v2 import functional as transforms

    x: Tensor = transforms.to_dtype(transforms.pil_to_tensor(image), torch.float32, scale=True)
    normalised: Tensor = transforms.normalize(x, list(mean), list(std))
    return normalised


class Preprocessing(Protocol):
    """Settings that both a recipe and the card of weights have."""

    image_size: int
    crop_pct: float
    interpolation: str


def eval_transform(settings: Preprocessing, mean: Statistics, std: Statistics) -> Transform:
    """Transform from RGB image to (3, image_size, image_size) float32: resize, center crop, normalisation.

    The transform raises Unreadable for images that would have too many pixels after the resize.

    Raises:
        UsageError: settings rejected by timm, or timm is not installed.
    """
    transform = _create(
        input_size=settings.image_size,
        is_training=False,
        crop_pct=settings.crop_pct,
        interpolation=settings.interpolation,
        mean=tuple(mean),
        std=tuple(std),
    )
    return Bounded(transform, settings.image_size / settings.crop_pct)


@dataclass
class Bounded:
    """Wraps a transform that starts by resizing the shorter side to `shorter` pixels, and checks the resized size."""

    transform: Transform
    shorter: float

    def __call__(self, image: Image.Image) -> Tensor:
        factor = self.shorter / min(image.size)
        check_resized(image.height * factor, image.width * factor)
        return self.transform(image)


def train_transform(recipe: Recipe, size: int, mean: Statistics, std: Statistics) -> Transform:
    """Transform from RGB image to (3, size, size) float32: random augmentation (global generators), normalisation.

    Raises:
        UsageError: settings rejected by timm, or timm is not installed.
    """
    return _create(
        input_size=size,
        is_training=True,
        scale=tuple(recipe.scale),
        ratio=tuple(recipe.ratio),
        hflip=recipe.hflip,
        color_jitter=recipe.color_jitter or None,
        auto_augment=recipe.auto_augment or None,
        interpolation=recipe.interpolation,
        re_prob=recipe.reprob,
        re_mode="pixel",
        mean=tuple(mean),
        std=tuple(std),
    )


def _create(**options: Any) -> Transform:
    try:
        from timm.data import auto_augment, create_transform
    except ImportError as error:
        raise UsageError("images need timm and torchvision: pip install 'xformer-kernels[models]'") from error
    for name in ("scale", "ratio"):
        if name in options and not (len(options[name]) == 2 and 0 < options[name][0] <= options[name][1]):
            raise UsageError(f"{name} must be two numbers above 0 in order, got {list(options[name])}")
    auto_augment.NAME_TO_OP.update({name: posterize for name in auto_augment.NAME_TO_OP if "Posterize" in name})
    try:
        transform: Transform = create_transform(**options)
    except (AssertionError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        given = {key: value for key, value in options.items() if key not in ("mean", "std", "is_training", "re_mode")}
        raise UsageError(f"timm makes no transform of {given}: {type(error).__name__} {error}") from error
    return transform


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Replaces timm's operation: its policies may ask for 0 bits, that is a black image, which Pillow 13 rejects."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, min(bits, 8))
