"""Image classification: one label per image, mixup and cutmix, accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from xformer.backbone import XFormer
from xformer.errors import UsageError
from xformer.recipes.card import Card
from xformer.recipes.data.classification import ClassificationData, open_data
from xformer.recipes.data.transforms import eval_transform
from xformer.recipes.tasks import Answer, Metrics, Option, Predictor, Task, check_options, register
from xformer.registry import build, default_cfgs


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


class ClassPredictor(Predictor):
    """Returns ``top``: the most likely classes, best first, each with ``name``, ``index`` and ``probability``."""

    columns = ("probability", "class")

    def __init__(self, model: nn.Module, card: Card, names: Sequence[str], top: int = 5, batch_size: int = 32) -> None:
        super().__init__(model, card, names, batch_size)
        if top < 1:
            raise UsageError(f"top must be 1 or more, got {top}")
        self.top = min(top, card.num_classes)
        self.transform = eval_transform(card, card.mean, card.std)

    def __call__(self, images: Sequence[Image.Image]) -> list[Answer | None]:
        logits = self.model(torch.stack([self.transform(image) for image in images])).float()
        best = logits.softmax(-1).topk(self.top)
        answers: list[Answer | None] = []
        for row, values, indices in zip(logits, best.values.tolist(), best.indices.tolist(), strict=True):
            guesses = [
                {"name": self.names[i], "index": i, "probability": p} for p, i in zip(values, indices, strict=True)
            ]
            answers.append(({"top": guesses}, None) if row.isfinite().all() else None)
        return answers

    def rows(self, found: dict[str, Any]) -> list[tuple[str, ...]]:
        return [(f"{guess['probability']:7.2%}", guess["name"]) for guess in found["top"]]


@register("classify")
class Classify(Task):
    metric, resize, eval_batch = "top1", "crop", None
    model, dataset, predictor = XFormer, staticmethod(open_data), ClassPredictor
    options: ClassVar[Mapping[str, Option]] = {
        "top": Option(5, "classes to print"),
        "batch_size": Option(32, "images at a time"),
    }

    data: ClassificationData

    @cached_property
    def mixup(self) -> Any:
        """timm's mixup and cutmix, or None."""
        recipe = self.recipe
        if recipe.mixup == recipe.cutmix == 0:
            return None
        from timm.data import Mixup

        return Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=len(self.data.classes))

    @classmethod
    def create(cls, card: Card) -> nn.Module:
        """Create one of our models, or one of timm's if timm is installed."""
        name, classes, channels = card.model, card.num_classes, card.in_chans
        check_options(card)
        try:
            if name in default_cfgs:
                return build(name, num_classes=classes, in_chans=channels, **card.options)
            import timm

            if timm.is_model(name):
                model: nn.Module = timm.create_model(name, num_classes=classes, in_chans=channels, **card.options)
                return model
        except (TypeError, ValueError) as error:
            raise UsageError(f"model {name} does not take these options: {error}") from error
        names = ", ".join(default_cfgs)
        raise UsageError(f"model must be one of {names} or a name of timm.list_models(), got {name!r}")

    def card(self) -> Card:
        return replace(super().card(), mean=self.data.mean, std=self.data.std)

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
        return Accuracy(len(self.data.classes), device)
