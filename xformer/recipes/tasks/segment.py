"""Semantic segmentation: a class for each pixel, and the mean intersection over union."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from xformer.errors import UsageError
from xformer.recipes.card import Card
from xformer.recipes.data.segmentation import CLASSES, COLOURS, IGNORE, CityscapesData
from xformer.recipes.data.transforms import to_tensor
from xformer.recipes.lettering import font, legible
from xformer.recipes.pictures import colour
from xformer.recipes.tasks import OUT, Answer, Metrics, Option, Predictor, Task, register
from xformer.segmentation.decoder import upsample
from xformer.segmentation.model import STRIDES, Segmenter, check_windows

ALPHA = 0.5
"""Opacity of the colours over the image."""
TWO = {"nargs": 2, "type": int, "metavar": ("H", "W")}
STRIDE = STRIDES[0]
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


class PixelPredictor(Predictor):
    """Returns ``width`` and ``height`` of the upright image, and ``classes``.

    Each class has ``name``, ``index`` and ``share``, its fraction of the pixels.

    Args:
        window, stride: (H, W) for :meth:`xformer.segmentation.Segmenter.sliding_window`; whole images if not given.
            `stride` defaults to three quarters of the window.
        legend: draw the classes that occur and their colours below the picture.
    """

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


@register("segment")
class Segment(Task):
    metric = "miou"
    model, dataset, predictor = Segmenter, CityscapesData, PixelPredictor
    options: ClassVar[Mapping[str, Option]] = {
        "window": Option(None, "predict windows of this size in place of whole images", TWO),
        "stride": Option(None, "distance of windows; without it three quarters of their sides", TWO),
        "legend": Option(True, "below each picture, the colours of its classes"),
        "out": OUT,
    }
    unused: ClassVar[tuple[str, ...]] = (
        "ratio", "auto_augment", "reprob", "interpolation", "crop_pct", "mixup", "cutmix",
        "train_shards", "eval_shards", "train_samples", "eval_samples",
    )  # fmt: skip
    data: CityscapesData

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
