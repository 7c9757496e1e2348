"""How an image becomes what a model saw in its evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from xformer.weights import Card


def eval_transform(card: Card) -> Callable[[Any], Tensor]:
    """From a PIL image to (in_chans, image_size, image_size): resized, its centre cropped, normalised; by timm."""
    from timm.data import create_transform

    transform: Callable[[Any], Tensor] = create_transform(
        input_size=(card.in_chans, card.image_size, card.image_size),
        is_training=False,
        interpolation=card.interpolation,
        mean=tuple(card.mean),
        std=tuple(card.std),
        crop_pct=card.crop_pct,
    )
    return transform
