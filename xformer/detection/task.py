"""Detection task: object boxes, and COCO's mean average precision."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch.distributed as dist
from torch import Tensor

from xformer.card import Card
from xformer.data import Shard
from xformer.detection.boxes import ANCHORS, detect
from xformer.detection.coco import Annotations
from xformer.detection.data import CocoData, Target, restore
from xformer.detection.loss import DetectionLoss
from xformer.engine.task import Metrics, Task
from xformer.errors import UsageError
from xformer.recipe import Recipe

SCORE, IOU, LIMIT = 0.001, 0.6, 100
"""Thresholds for evaluation: COCO evaluates the best 100 detections per image, however low their scores."""


class MeanAP:
    """map (COCO's mAP, IoU from 0.5 to 0.95) and map50 in percent, by pycocotools, in pixels of the files.

    Computed over the images that were added, in any process: unreadable images are excluded.

    Raises:
        UsageError: pycocotools is not installed.
    """

    def __init__(self, annotations: Annotations, anchors: Sequence[Sequence[float]] = ANCHORS) -> None:
        try:
            import pycocotools.cocoeval  # noqa: F401
        except ImportError as error:
            raise UsageError("detection's metrics need pycocotools: pip install 'xformer-kernels[official]'") from error
        self.annotations, self.anchors = annotations, anchors
        self.categories = list(annotations.categories)
        self.found: dict[int, list[dict[str, Any]]] = {}

    def update(self, outputs: Sequence[Tensor], targets: Sequence[Target]) -> None:
        """Add the detections in raw maps of letterboxed images."""
        sizes = [target["size"] for target in targets]
        found = detect(outputs, self.anchors, score=SCORE, iou=IOU, limit=LIMIT, sizes=sizes)
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


class Detect(Task):
    name, metric = "detect", "map"
    unused = (
        "ratio", "auto_augment", "reprob", "interpolation", "crop_pct", "mixup", "cutmix", "smoothing",
        "train_shards", "eval_shards", "train_samples", "eval_samples", "classes",
    )  # fmt: skip
    data: CocoData

    def __init__(self, recipe: Recipe, rank: int = 0, world: int = 1, weights: Card | None = None) -> None:
        super().__init__(recipe)
        self.data = CocoData(recipe, Shard(rank, world), weights)

    def of_labels(self) -> dict[str, Any]:
        return {"class_ids": list(self.data.held_out.categories)}

    @property
    def anchors(self) -> Any:
        return self.recipe.model_options.get("anchors", ANCHORS)

    @cached_property
    def criterion(self) -> DetectionLoss:
        return DetectionLoss(self.anchors)

    def loss(self, outputs: Sequence[Tensor], targets: Sequence[Target]) -> Tensor:
        box, objectness, classes = self.criterion(outputs, targets).values()
        total: Tensor = box + objectness + classes
        return total

    def metrics(self, device: Any) -> Metrics:
        return MeanAP(self.data.held_out, self.anchors)
