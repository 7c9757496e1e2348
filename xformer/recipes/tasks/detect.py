"""Object detection: boxes, and COCO's mean average precision."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor, nn

from xformer.detection.boxes import ANCHORS, detect
from xformer.detection.loss import DetectionLoss
from xformer.detection.model import Detector
from xformer.errors import UsageError
from xformer.recipes.card import Card
from xformer.recipes.data.coco import Annotations, check_category_ids, coco_results, image_ids
from xformer.recipes.data.detection import CocoData, Target, letterbox, restore
from xformer.recipes.lettering import font, legible
from xformer.recipes.pictures import colour
from xformer.recipes.tasks import OUT, Answer, Metrics, Option, Predictor, Task, register

SCORE, IOU, LIMIT = 0.001, 0.6, 100
"""Thresholds for evaluation: COCO evaluates the best 100 detections per image, however low their scores."""


class MeanAP:
    """map (COCO's mAP, IoU from 0.5 to 0.95) and map50 in percent, by pycocotools, in pixels of the files.

    Computed over the images that were added, in any process: unreadable images are excluded.

    Raises:
        UsageError: pycocotools is not installed.
    """

    def __init__(
        self, annotations: Annotations, anchors: Sequence[Sequence[float]] = ANCHORS, centre_scale: float = 1.0
    ) -> None:
        try:
            import pycocotools.cocoeval  # noqa: F401
        except ImportError as error:
            raise UsageError("detection's metrics need pycocotools: pip install 'xformer-kernels[official]'") from error
        self.annotations, self.anchors, self.centre_scale = annotations, anchors, centre_scale
        self.categories = list(annotations.categories)
        self.found: dict[int, list[dict[str, Any]]] = {}

    def update(self, outputs: Sequence[Tensor], targets: Sequence[Target]) -> None:
        """Add the detections in raw maps of letterboxed images."""
        sizes = [target["size"] for target in targets]
        found = detect(
            outputs, self.anchors, score=SCORE, iou=IOU, limit=LIMIT, centre_scale=self.centre_scale, sizes=sizes
        )
        for of_it, target in zip(found, targets, strict=True):
            self.add(target["image_id"], restore(of_it["boxes"], target), of_it["scores"], of_it["labels"])

    def add(self, image_id: int, boxes: Tensor, scores: Tensor, labels: Tensor) -> None:
        """Add the detections of an image: boxes (n, 4) as (x0, y0, x1, y1) in pixels of the file, scores, labels."""
        rows = zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)
        self.found[image_id] = [
            {
                "image_id": image_id, "category_id": self.categories[label], "score": score,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
            }
            for (x0, y0, x1, y1), score, label in rows
        ]  # fmt: skip

    def compute(self) -> dict[str, float]:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        parts = [self.found]
        if dist.is_available() and dist.is_initialized():
            parts = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(parts, self.found)
        found = {number: rows for part in parts for number, rows in part.items()}
        detections = [row for number in sorted(found) for row in found[number]]
        if not detections:
            return {"map": 0.0, "map50": 0.0}
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = self.annotations.truth
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
            evaluation.params.imgIds = sorted(found)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        # stats are -1 if none of these images has a box
        return {name: 100 * max(0.0, float(evaluation.stats[i])) for i, name in enumerate(("map", "map50"))}


class BoxPredictor(Predictor):
    """Returns ``width`` and ``height`` of the upright image, and ``objects``, best first.

    Each object has ``name``, ``index``, ``score`` and ``box``: (x0, y0, x1, y1) in pixels of that image.

    Args:
        score, iou: see :func:`xformer.detection.detect`.
        json_format: "plain", or "coco" for COCO's results format.
        annotations: COCO JSON file with the image ids; if "", they are taken from the file names.
    """

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
        self.reads = (annotations,)
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
        found = self.model.detect(maps, score=self.score, iou=self.iou, sizes=sizes)
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


@register("detect")
class Detect(Task):
    metric, resize = "map", "fit"
    model, dataset, predictor = Detector, CocoData, BoxPredictor
    options: ClassVar[Mapping[str, Option]] = {
        "score": Option(0.3, "what is not above it is left out"),
        "iou": Option(0.45, "of two boxes of a class that overlap more the better stays"),
        "batch_size": Option(8, "images at a time"),
        "json_format": Option("plain", "plain, or coco for a list that pycocotools loads", {"metavar": "FORMAT"}, True),
        "annotations": Option(
            "", "COCO's JSON with the numbers of images, if they are not in their names",
            {"metavar": "FILE", "type": os.path.expanduser}, True,
        ),
        "out": OUT,
    }  # fmt: skip
    unused = (
        "ratio", "auto_augment", "reprob", "interpolation", "crop_pct", "mixup", "cutmix", "smoothing",
        "train_shards", "eval_shards", "train_samples", "eval_samples", "classes",
    )  # fmt: skip
    loss_options: ClassVar[Mapping[str, Any]] = {"anchor_iou": 0.5, "objectness": "iou"}
    """Arguments of :class:`DetectionLoss` besides the anchors and the centre scale, which are options of the model."""
    data: CocoData

    def of_labels(self) -> dict[str, Any]:
        return {"class_ids": list(self.data.held_out.categories)}

    @property
    def anchors(self) -> Any:
        return self.recipe.model_options.get("anchors", ANCHORS)

    @property
    def centre_scale(self) -> float:
        return float(self.recipe.model_options.get("centre_scale", 1.0))

    @cached_property
    def criterion(self) -> DetectionLoss:
        return DetectionLoss(self.anchors, centre_scale=self.centre_scale, **self.loss_options)

    def loss(self, outputs: Sequence[Tensor], targets: Sequence[Target]) -> Tensor:
        box, objectness, classes = self.criterion(outputs, targets).values()
        total: Tensor = box + objectness + classes
        return total

    def metrics(self, device: Any) -> Metrics:
        return MeanAP(self.data.held_out, self.anchors, self.centre_scale)
