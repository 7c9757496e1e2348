"""Segmentation task: a class for each pixel, and the mean intersection over union."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xformer.card import Card
from xformer.data import Shard
from xformer.engine.task import Metrics, Task
from xformer.recipe import Recipe
from xformer.segmentation.classes import IGNORE
from xformer.segmentation.data import CityscapesData
from xformer.segmentation.decoder import upsample

STRIDE = 4
"""Stride of the logits."""


class MeanIoU:
    """miou and pixel accuracy in percent, from torchmetrics' confusion matrix.

    ``IoU_c = TP_c / (TP_c + FP_c + FN_c)`` over all labelled pixels of all images; the mean is over classes that occur
    in labels or predictions, as in Cityscapes' own evaluation.
    """

    def __init__(self, num_classes: int, device: Any) -> None:
        from torchmetrics.classification import MulticlassConfusionMatrix

        self.matrix = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE).to(device)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.matrix.update(upsample(outputs.float(), STRIDE, targets.shape[1:]).argmax(1), targets)

    def per_class(self) -> Tensor:
        """IoU per class (num_classes,); nan if a class does not occur."""
        return iou(self.matrix.compute())

    def compute(self) -> dict[str, float]:
        matrix = self.matrix.compute().double()
        return {"miou": 100 * float(iou(matrix).nanmean()), "pixels": 100 * float(matrix.trace() / matrix.sum())}


def iou(matrix: Tensor) -> Tensor:
    """IoU per class (C,) from a confusion matrix (C, C)."""
    matrix = matrix.double()
    hits = matrix.diag()
    return hits / (matrix.sum(0) + matrix.sum(1) - hits)


class Segment(Task):
    name, metric = "segment", "miou"
    unused: tuple[str, ...] = (
        "ratio", "auto_augment", "reprob", "interpolation", "crop_pct", "mixup", "cutmix",
        "train_shards", "eval_shards", "train_samples", "eval_samples",
    )  # fmt: skip
    data: CityscapesData

    def __init__(self, recipe: Recipe, rank: int = 0, world: int = 1, weights: Card | None = None) -> None:
        super().__init__(recipe)
        self.data = CityscapesData(recipe, Shard(rank, world), weights)

    def of_labels(self) -> dict[str, Any]:
        return {"class_ids": list(self.data.labels.ids), "colours": list(self.data.labels.colours)}

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy over pixels that are not ignored; 0 if all are."""
        logits = upsample(outputs.float(), STRIDE, targets.shape[1:])
        rows = logits.movedim(1, -1).flatten(0, 2)  # a view if channels_last; cross entropy is faster on rows
        total = F.cross_entropy(
            rows, targets.flatten(), ignore_index=IGNORE, label_smoothing=self.recipe.smoothing, reduction="sum"
        )
        return total / torch.clamp((targets != IGNORE).sum(), min=1)

    def metrics(self, device: Any) -> Metrics:
        return MeanIoU(len(self.data.classes), device)
