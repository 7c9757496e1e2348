"""Preprocessing of a card as part of the model: takes 8-bit pixels, returns the outputs of the model.

A resize is computed as two matrix products; the matrices are computed from the sizes, which may be dynamic. They have
Pillow's coefficients, multiples of 2^-22, and each product is rounded to 8 bits, as in Pillow. In float64 there is no
other rounding: every runtime computes the same pixels, whatever its order of summation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from xformer.errors import UsageError
from xformer.recipes.card import Card
from xformer.recipes.tasks import find_task


def bilinear(x: Tensor) -> Tensor:
    """Bilinear weight of a pixel at distance x >= 0."""
    return (1 - x).clamp(min=0)


def bicubic(x: Tensor) -> Tensor:
    """Bicubic weight of a pixel at distance x >= 0, with a = -0.5 as in Pillow."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


BITS = 22
"""Fractional bits of Pillow's coefficients."""
FILTERS: dict[str, Callable[[Tensor], Tensor]] = {"bilinear": bilinear, "bicubic": bicubic}


def resize_matrix(
    filter: Callable[[Tensor], Tensor], pixels: int, resized: Tensor, first: Tensor | int, count: int
) -> Tensor:
    """Matrix (count, pixels) float64 from a line of pixels to `count` pixels of the resized line.

    Args:
        filter: one of FILTERS. pixels: length of the line. resized: length of the resized line, a float64 scalar.
        first: index of the first computed pixel; rows beyond `resized` are 0.
    """
    at = torch.arange(count, dtype=torch.float64) + first
    scale = torch.full((), pixels, dtype=torch.float64) / resized
    centres = ((at + 0.5) * scale)[:, None]
    distances = (torch.arange(pixels, dtype=torch.float64) - centres + 0.5) * (1 / scale.clamp(min=1))
    weights = filter(distances.abs())
    weights = 2**BITS * (weights / weights.sum(1, keepdim=True))
    weights = torch.sign(weights) * torch.floor(weights.abs() + 0.5) / 2**BITS
    return torch.where((at < resized)[:, None], weights, torch.zeros_like(weights))


def to_bytes(x: Tensor) -> Tensor:
    """Round to integers from 0 to 255, in the same dtype."""
    return torch.floor(x + 0.5).clamp(0, 255)


def height_first(height: Tensor, width: Tensor, resized_height: Tensor, resized_width: Tensor) -> Tensor:
    """Whether Pillow resizes the height before the width: for tall images, since Pillow 13."""
    less = height - resized_height
    return (less > 0) & (less > 2 * (width - resized_width))


def resize(images: Tensor, rows: Tensor, columns: Tensor, rows_first: Tensor) -> Tensor:
    """Resize (B, H, W, C) uint8 with matrices (h, H) and (w, W), in either order, to integers (B, C, h, w) float64."""

    def planes(images: Tensor) -> Tensor:
        # inside the branches: permuted views are passed into those of an aoti file with wrong strides
        return images.permute(0, 3, 1, 2).double().contiguous()

    def one(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return to_bytes(to_bytes(rows @ planes(images)) @ columns.T)

    def other(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return to_bytes(rows @ to_bytes(planes(images) @ columns.T))

    if torch.compiler.is_exporting():
        either: Tensor = torch.cond(rows_first, one, other, (images, rows, columns))
        return either
    return (one if rows_first else other)(images, rows, columns)


class Preprocessed(nn.Module):
    """A model with the preprocessing of its card: (B, H, W, 3) uint8, RGB, to the outputs of the model.

    Images are resized as ``Task.resize`` of the card's task says: "crop" as in
    :func:`xformer.recipes.data.transforms.eval_transform`, "fit" as in
    :func:`xformer.recipes.data.detection.letterbox`, or not at all.

    Raises:
        UsageError: not three channels, an interpolation not in FILTERS, or a crop larger than the resized image.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, card: Card) -> None:
        super().__init__()
        self.resize = find_task(card.task).resize
        crops = self.resize == "crop"
        if card.in_chans != 3:
            raise UsageError(f"preprocessing is of images with 3 channels, got a model of {card.in_chans}")
        if crops and card.interpolation not in FILTERS:
            raise UsageError(f"interpolation must be {' or '.join(FILTERS)} in a file, got {card.interpolation}")
        if crops and not 0 < card.crop_pct <= 1:
            raise UsageError(f"crop_pct must be above 0 and at most 1 in a file, got {card.crop_pct}")
        self.model = model
        self.size = card.image_size
        self.shorter = int(card.image_size / card.crop_pct)
        self.filter = FILTERS[card.interpolation if crops else "bilinear"]
        for name, values in (("mean", card.mean), ("std", card.std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def prepare(self, images: Tensor) -> Tensor:
        """Preprocess to (B, 3, size, size) float32; (B, 3, H, W) for segmenters."""
        if self.resize == "none":
            return self._normalised(images.permute(0, 3, 1, 2))
        height, width = images.shape[1:3]
        sides = [torch.full((), side, dtype=torch.float64) for side in (height, width)]
        inside = torch.ones((), dtype=torch.bool)
        if self.resize == "crop":
            resized = [torch.floor(self.shorter * side / torch.minimum(*sides)) for side in sides]
            firsts = [torch.round((side - self.size) / 2) for side in resized]
        else:
            factor = self.size / torch.maximum(*sides)
            resized = [torch.round(side * factor).clamp(min=1) for side in sides]
            firsts = [torch.zeros((), dtype=torch.float64)] * 2
            at = torch.arange(self.size)
            inside = (at < resized[0])[:, None] & (at < resized[1])
        rows, columns = (
            resize_matrix(self.filter, *line, self.size) for line in zip((height, width), resized, firsts, strict=True)
        )
        x = resize(images, rows, columns, height_first(*sides, *resized))
        return torch.where(inside, self._normalised(x), torch.zeros(()))

    def _normalised(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        outputs: Tensor | list[Tensor] = self.model(self.prepare(images))
        return outputs
