"""Predict the class of every pixel and draw the classes in colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from xformer.data.transforms import to_tensor
from xformer.errors import UsageError
from xformer.lettering import font, legible
from xformer.pictures import colour
from xformer.predict import Answer, Predictor
from xformer.segmentation.classes import CLASSES, COLOURS
from xformer.segmentation.model import Segmenter, check_windows
from xformer.weights import Card

ALPHA = 0.5
"""Opacity of the colours over the image."""


class Pixels(Predictor):
    """Returns ``width`` and ``height`` of the upright image, and ``classes``.

    Each class has ``name``, ``index`` and ``share``, its fraction of the pixels.

    Args:
        window, stride: (H, W) for :meth:`xformer.segmentation.Segmenter.sliding_window`; whole images if not given.
            `stride` defaults to three quarters of the window.
        legend: draw the classes that occur and their colours below the picture.
    """

    defaults: ClassVar[dict[str, Any]] = {"window": None, "stride": None, "legend": True, "out": "predictions"}
    columns = ("share", "class")
    model: Segmenter

    def __init__(
        self,
        model: nn.Module,
        card: Card,
        names: Sequence[str],
        window: Sequence[int] | None = None,
        stride: Sequence[int] | None = None,
        legend: bool = True,
    ) -> None:
        super().__init__(model, card, names)
        self.legend = legend
        if stride and not window:
            raise UsageError(f"stride needs a window, got stride={tuple(stride)} alone")
        self.windows: dict[str, tuple[int, int]] = {}
        if window:
            stride = stride or [max(1, side * 3 // 4) for side in window]
            self.windows = {"window": (window[0], window[1]), "stride": (stride[0], stride[1])}
            check_windows(**self.windows)
        official = dict(zip(CLASSES, COLOURS, strict=True))
        known = card.classes or names
        colours = card.colours or [official.get(name, colour(i)) for i, name in enumerate(known)]
        self.colours = np.array(colours, np.uint8)

    def __call__(self, images: Sequence[Image.Image]) -> list[Answer | None]:
        return [self._one(image) for image in images]

    def _one(self, image: Image.Image) -> Answer | None:
        x = to_tensor(image, self.card.mean, self.card.std)[None]
        logits: Tensor = self.model.sliding_window(x, **self.windows) if self.windows else self.model.whole_image(x)
        if not logits.isfinite().all():
            return None
        found = logits[0].argmax(0)
        shares = torch.bincount(found.flatten(), minlength=len(self.names)) / found.numel()
        classes = [
            {"name": name, "index": i, "share": share}
            for i, (name, share) in enumerate(zip(self.names, shares.tolist(), strict=True))
        ]
        said = {"width": image.width, "height": image.height, "classes": classes}
        drawn = Image.blend(image, Image.fromarray(self.colours[found.numpy()]), ALPHA)
        if self.legend:
            there = [(of_it["name"], of_it["index"]) for of_it in _largest_first(classes)]
            drawn = with_legend(drawn, [(name, i, tuple(self.colours[i].tolist())) for name, i in there])
        return said, drawn

    def rows(self, found: dict[str, Any]) -> list[tuple[str, ...]]:
        """The classes that occur, largest first."""
        return [(f"{of_it['share']:7.2%}", of_it["name"]) for of_it in _largest_first(found["classes"])]


def _largest_first(classes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted((of_it for of_it in classes if of_it["share"]), key=lambda of_it: -of_it["share"])


def with_legend(image: Image.Image, classes: Sequence[tuple[str, int, tuple[int, ...]]]) -> Image.Image:
    """Return the image with a legend on a white strip below it. Each class is given as (name, number, colour).

    The result is wider than the image only if a class does not fit in the width of the image.
    """
    size = max(10, max(image.size) / 50)
    side, gap = round(size), round(size / 2)
    pen = ImageDraw.Draw(image)
    places, x, row, width = [], gap, 0, image.width
    for name, number, fill in classes:
        text, path = legible(name, number)
        letters = font(path, size)
        length = side + gap + round(pen.textlength(text, letters)) + 2 * gap
        if x > gap and x + length > image.width:
            x, row = gap, row + 1
        places.append((x, row, text, letters, fill))
        x += length
        width = max(width, x)
    height = side + gap
    drawn = Image.new("RGB", (width, image.height + gap + (row + 1) * height), "white")
    drawn.paste(image)
    pen = ImageDraw.Draw(drawn)
    for x, row, text, letters, fill in places:
        top = image.height + gap + row * height
        pen.rectangle((x, top, x + side - 1, top + side - 1), fill, "black")
        pen.text((x + side + gap, top + side / 2), text, "black", letters, anchor="lm")
    return drawn
