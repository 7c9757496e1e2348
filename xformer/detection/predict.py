"""Objects of images, and pictures of their boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from xformer.detection.boxes import detect
from xformer.detection.data import letterbox, restore
from xformer.detection.model import Detector
from xformer.errors import UsageError
from xformer.predict import Predictor, colour
from xformer.weights import Card


class Boxes(Predictor):
    """``width`` and ``height`` of the upright image, and ``objects``, best first.

    Each has ``name``, ``index``, ``score`` and ``box``: (x0, y0, x1, y1) in pixels of that image.

    Args:
        score, iou: of :func:`xformer.detection.detect`.
    """

    defaults: ClassVar[dict[str, Any]] = {"score": 0.3, "iou": 0.45, "batch_size": 8, "out": "predictions"}
    columns = ("score", "class", "box")
    model: Detector

    def __init__(
        self,
        model: nn.Module,
        card: Card,
        names: Sequence[str],
        score: float = 0.3,
        iou: float = 0.45,
        batch_size: int = 8,
    ) -> None:
        super().__init__(model, card, names, batch_size)
        for name, value in (("score", score), ("iou", iou)):
            if not 0 <= value <= 1:
                raise UsageError(f"{name} must be from 0 to 1, got {value}")
        self.score, self.iou = score, iou

    def __call__(self, images: Sequence[Image.Image]) -> list[tuple[dict[str, Any], Image.Image | None]]:
        nothing = {"boxes": torch.zeros(0, 4)}
        seen = [letterbox(image, nothing, self.card.image_size) for image in images]
        maps = self.model(torch.stack([x for x, _ in seen]))
        sizes = [target["size"] for _, target in seen]
        found = detect(maps, self.model.anchors, score=self.score, iou=self.iou, sizes=sizes)
        answers: list[tuple[dict[str, Any], Image.Image | None]] = []
        for image, (_, target), of_it in zip(images, seen, found, strict=True):
            rows = zip(
                of_it["labels"].tolist(),
                of_it["scores"].tolist(),
                restore(of_it["boxes"], target).tolist(),
                strict=True,
            )
            objects = [{"name": self.names[i], "index": i, "score": score, "box": box} for i, score, box in rows]
            said = {"width": image.width, "height": image.height, "objects": objects}
            answers.append((said, draw(image, objects)))
        return answers

    def rows(self, found: dict[str, Any]) -> list[tuple[str, ...]]:
        return [
            (f"{of_it['score']:7.2%}", of_it["name"], " ".join(f"{side:.0f}" for side in of_it["box"]))
            for of_it in found["objects"]
        ]


def draw(image: Image.Image, objects: Sequence[dict[str, Any]]) -> Image.Image:
    """A copy with boxes, class names and scores, the best on top; a colour for each class."""
    drawn = image.copy()
    pen = ImageDraw.Draw(drawn)
    longer = max(image.size)
    line, font = max(2, round(longer / 300)), ImageFont.load_default(max(10, longer / 40))
    for of_it in reversed(objects):
        x0, y0, x1, y1 = of_it["box"]
        fill = colour(of_it["index"])
        pen.rectangle((x0, y0, x1, y1), outline=fill, width=line)
        text = " ".join(f"{of_it['name']} {of_it['score']:.2f}".split())
        _, _, width, height = pen.textbbox((line, line), text, font, anchor="lt")
        width, height = width + line, height + line
        left = max(0, min(x0, image.width - width))
        top = y0 - height if y0 >= height else y0  # above the box, where there is room
        pen.rectangle((left, top, left + width, top + height), fill)
        dark = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] < 128
        pen.text((left + line, top + line), text, "white" if dark else "black", font, anchor="lt")
    return drawn
