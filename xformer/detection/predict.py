"""Predict the objects in images and draw their boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image, ImageDraw
from torch import nn

from xformer.detection.boxes import detect
from xformer.detection.data import letterbox, restore
from xformer.detection.model import Detector
from xformer.detection.results import check_category_ids, coco_results, image_ids
from xformer.errors import UsageError
from xformer.lettering import font, legible
from xformer.pictures import colour
from xformer.predict import Answer, Predictor
from xformer.weights import Card


class Boxes(Predictor):
    """Returns ``width`` and ``height`` of the upright image, and ``objects``, best first.

    Each object has ``name``, ``index``, ``score`` and ``box``: (x0, y0, x1, y1) in pixels of that image.

    Args:
        score, iou: see :func:`xformer.detection.detect`.
        json_format: "plain", or "coco" for COCO's results format.
        annotations: COCO JSON file with the image ids; if "", they are taken from the file names.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "score": 0.3, "iou": 0.45, "batch_size": 8, "json_format": "plain", "annotations": "", "out": "predictions",
    }  # fmt: skip
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
        json_format: str = "plain",
        annotations: str = "",
    ) -> None:
        super().__init__(model, card, names, batch_size)
        for name, value in (("score", score), ("iou", iou)):
            if not 0 <= value <= 1:
                raise UsageError(f"{name} must be from 0 to 1, got {value}")
        self.score, self.iou = score, iou
        if json_format not in ("plain", "coco"):
            raise UsageError(f"json-format must be plain or coco, got {json_format!r}")
        if annotations and json_format != "coco":
            raise UsageError(f"annotations needs --json-format coco, got {annotations!r} with {json_format}")
        self.coco, self.annotations = json_format == "coco", annotations
        if self.coco:
            check_category_ids(card)
        self.ids: dict[str, int] = {}

    def check(self, images: Sequence[str]) -> None:
        if self.coco:
            self.ids = image_ids(images, self.annotations)

    def to_json(self, results: Sequence[dict[str, Any]]) -> Any:
        return coco_results(results, self.ids, self.card.class_ids) if self.coco else results

    def __call__(self, images: Sequence[Image.Image]) -> list[Answer | None]:
        nothing = {"boxes": torch.zeros(0, 4)}
        seen = [letterbox(image, nothing, self.card.image_size, self.card.mean, self.card.std) for image in images]
        maps = self.model(torch.stack([x for x, _ in seen]))
        sizes = [target["size"] for _, target in seen]
        found = detect(maps, self.model.anchors, score=self.score, iou=self.iou, sizes=sizes)
        finite = [all(of_it[i].isfinite().all() for of_it in maps) for i in range(len(images))]
        answers: list[Answer | None] = []
        for image, (_, target), of_it, usable in zip(images, seen, found, finite, strict=True):
            if not usable:
                answers.append(None)
                continue
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
    """Return a copy with boxes, class names and scores drawn, the best on top, in one colour per class."""
    drawn = image.copy()
    pen = ImageDraw.Draw(drawn)
    longer = max(image.size)
    line, size = max(2, round(longer / 300)), max(10, longer / 40)
    for of_it in reversed(objects):
        x0, y0, x1, y1 = of_it["box"]
        fill = colour(of_it["index"])
        pen.rectangle((x0, y0, x1, y1), outline=fill, width=line)
        name, path = legible(of_it["name"], of_it["index"])
        text, letters = f"{name} {of_it['score']:.2f}", font(path, size)
        _, _, width, height = pen.textbbox((line, line), text, letters, anchor="lt")
        width, height = width + line, height + line
        left = max(0, min(x0, image.width - width))
        top = y0 - height if y0 >= height else y0  # above the box if there is room
        pen.rectangle((left, top, left + width, top + height), fill)
        dark = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] < 128
        pen.text((left + line, top + line), text, "white" if dark else "black", letters, anchor="lt")
    return drawn
