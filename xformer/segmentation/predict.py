"""Classes of the pixels of images, and pictures of them in colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from xformer.data.transforms import to_tensor
from xformer.errors import UsageError
from xformer.predict import Predictor, colour
from xformer.segmentation.classes import CLASSES, COLOURS
from xformer.segmentation.model import Segmenter, check_windows
from xformer.weights import Card

ALPHA = 0.5
"""Of the colours over the image."""


class Pixels(Predictor):
    """``width`` and ``height`` of the upright image, and ``classes``: ``name``, ``index`` and ``share`` of pixels.

    Args:
        window, stride: (H, W) of :meth:`xformer.segmentation.Segmenter.sliding_window`; without them whole images.
            A stride is three quarters of its window, if it is not given.
    """

    defaults: ClassVar[dict[str, Any]] = {"window": None, "stride": None, "out": "predictions"}
    columns = ("share", "class")
    model: Segmenter

    def __init__(
        self,
        model: nn.Module,
        card: Card,
        names: Sequence[str],
        window: Sequence[int] | None = None,
        stride: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, card, names)
        if stride and not window:
            raise UsageError(f"stride needs a window, got stride={tuple(stride)} alone")
        self.windows: dict[str, tuple[int, int]] = {}
        if window:
            stride = stride or [max(1, side * 3 // 4) for side in window]
            self.windows = {"window": (window[0], window[1]), "stride": (stride[0], stride[1])}
            check_windows(**self.windows)
        official = dict(zip(CLASSES, COLOURS, strict=True))
        known = card.classes or names
        self.colours = np.array([official.get(name, colour(i)) for i, name in enumerate(known)], np.uint8)

    def __call__(self, images: Sequence[Image.Image]) -> list[tuple[dict[str, Any], Image.Image | None]]:
        return [self._one(image) for image in images]

    def _one(self, image: Image.Image) -> tuple[dict[str, Any], Image.Image]:
        x = to_tensor(image)[None]
        logits: Tensor = self.model.sliding_window(x, **self.windows) if self.windows else self.model.whole_image(x)
        found = logits[0].argmax(0)
        shares = torch.bincount(found.flatten(), minlength=len(self.names)) / found.numel()
        classes = [
            {"name": name, "index": i, "share": share}
            for i, (name, share) in enumerate(zip(self.names, shares.tolist(), strict=True))
        ]
        coloured = Image.fromarray(self.colours[found.numpy()])
        said = {"width": image.width, "height": image.height, "classes": classes}
        return said, Image.blend(image, coloured, ALPHA)

    def rows(self, found: dict[str, Any]) -> list[tuple[str, ...]]:
        """The classes that there are, the largest first."""
        there = sorted((of_it for of_it in found["classes"] if of_it["share"]), key=lambda of_it: -of_it["share"])
        return [(f"{of_it['share']:7.2%}", of_it["name"]) for of_it in there]
