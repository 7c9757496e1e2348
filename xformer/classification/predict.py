"""Predict the most likely classes of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import nn

from xformer.data.transforms import eval_transform
from xformer.errors import UsageError
from xformer.predict import Answer, Predictor
from xformer.weights import Card


class Classes(Predictor):
    """Returns ``top``: the most likely classes, best first, each with ``name``, ``index`` and ``probability``."""

    defaults: ClassVar[dict[str, Any]] = {"top": 5, "batch_size": 32}
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
