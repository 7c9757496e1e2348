"""Classification task: one label per image, mixup and cutmix, accuracy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xformer.card import Card
from xformer.data import Shard, open_data
from xformer.engine.task import Metrics, Task
from xformer.recipe import Recipe


class Accuracy:
    """top1 and top5 accuracy in percent and mean cross entropy, computed by torchmetrics."""

    def __init__(self, num_classes: int, device: Any) -> None:
        from torchmetrics import MeanMetric
        from torchmetrics.classification import MulticlassAccuracy

        self.parts = {
            f"top{k}": MulticlassAccuracy(num_classes, top_k=k, average="micro").to(device)
            for k in (1, 5)
            if k <= num_classes
        }
        self.loss = MeanMetric().to(device)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        for part in self.parts.values():
            part.update(outputs, targets)
        self.loss.update(F.cross_entropy(outputs.float(), targets, reduction="none"))

    def compute(self) -> dict[str, float]:
        return {name: 100 * float(part.compute()) for name, part in self.parts.items()} | {
            "loss": float(self.loss.compute())
        }


class Classify(Task):
    name, metric = "classify", "top1"

    def __init__(self, recipe: Recipe, rank: int = 0, world: int = 1, weights: Card | None = None) -> None:
        super().__init__(recipe)
        self.data = self.images = open_data(recipe, Shard(rank, world), weights)
        self.mixup = None
        if recipe.mixup > 0 or recipe.cutmix > 0:
            from timm.data import Mixup

            self.mixup = Mixup(
                recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=len(self.images.classes)
            )

    def card(self) -> Card:
        return replace(super().card(), mean=self.images.mean, std=self.images.std)

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.mixup is None or len(images) % 2:
            return images, targets
        mixed: tuple[Tensor, Tensor] = self.mixup(images, targets)
        return mixed

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():  # mixed: label smoothing is already applied
            return torch.sum(-targets * outputs.log_softmax(-1), -1).mean()
        return F.cross_entropy(outputs, targets, label_smoothing=self.recipe.smoothing)

    def metrics(self, device: Any) -> Metrics:
        return Accuracy(len(self.images.classes), device)
