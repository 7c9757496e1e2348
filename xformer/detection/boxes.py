"""Boxes and raw maps: YOLOv3's coding of boxes, and detections out of maps.

Boxes are in pixels of the image that the model saw: (x0, y0, x1, y1), or (cx, cy, w, h) where it is said. A prediction
(tx, ty, tw, th) of the cell in column i and row j, of stride s and anchor (aw, ah), is the box

    cx = s (i + sigmoid(tx))     w = aw exp(tw)
    cy = s (j + sigmoid(ty))     h = ah exp(th)

with tw and th clamped to +-EXPONENT. Predictions of all maps are P in a row: by stride, then row, column and anchor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert, clip_boxes_to_image

from xformer.errors import UsageError

STRIDES = (8, 16, 32)
PER_SCALE = 3
ANCHORS = ((10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326))
"""YOLOv3's of COCO, in pixels of images of 416 x 416."""
EXPONENT = math.log(1000 / 16)
"""A box is at most 62.5 times as large as its anchor, and at most so much smaller."""


def check_anchors(anchors: Sequence[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    """The same anchors as pairs of floats.

    Raises:
        UsageError: not nine pairs of finite positive numbers.
    """
    pairs = tuple(tuple(float(v) for v in pair) for pair in anchors)
    if len(pairs) != len(ANCHORS) or not all(len(p) == 2 and all(0 < v < math.inf for v in p) for p in pairs):
        raise UsageError(f"anchors must be {len(ANCHORS)} pairs (w, h) of positive numbers, got {pairs}")
    return tuple((p[0], p[1]) for p in pairs)


class Grid(NamedTuple):
    """Where predictions are: cells (P, 2) as column and row, strides (P, 1), anchors (P, 2) in pixels."""

    cells: Tensor
    strides: Tensor
    anchors: Tensor

    def take(self, index: Tensor) -> Grid:
        """Of some predictions."""
        return Grid(*(part[index] for part in self))


def flatten(maps: Sequence[Tensor]) -> Tensor:
    """Raw maps (B, 3 (5 + classes), H/s, W/s) to (B, P, 5 + classes), in float32 or, if they are, float64.

    Raises:
        ValueError: not three maps, of one batch, with three times more than five channels each.
    """
    channels = maps[0].shape[1] if maps and maps[0].dim() == 4 else 0
    if (
        len(maps) != len(STRIDES)
        or channels % PER_SCALE
        or channels <= PER_SCALE * 5
        or any(m.dim() != 4 or m.shape[:2] != maps[0].shape[:2] for m in maps)
    ):
        raise ValueError(
            f"maps must be {len(STRIDES)} of shape (B, {PER_SCALE} (5 + classes), H, W), "
            f"got {[tuple(m.shape) for m in maps]}"
        )
    width = channels // PER_SCALE
    rows = []
    for m in maps:
        m = m.permute(0, 2, 3, 1)
        rows.append(m.reshape(m.shape[0], m.shape[1] * m.shape[2] * PER_SCALE, width))
    flat = torch.cat(rows, 1)
    return flat if flat.dtype is torch.float64 else flat.float()


def grid(maps: Sequence[Tensor], anchors: Sequence[Sequence[float]], dtype: torch.dtype = torch.float32) -> Grid:
    """Of the predictions of these maps, of which shapes and device alone matter."""
    device = maps[0].device
    table = torch.tensor(anchors, dtype=dtype, device=device).view(len(STRIDES), PER_SCALE, 2)
    cells, strides, sizes = [], [], []
    for m, stride, of_scale in zip(maps, STRIDES, table, strict=True):
        height, width = m.shape[-2:]
        rows = torch.arange(height, device=device, dtype=dtype)[:, None, None].expand(height, width, PER_SCALE)
        columns = torch.arange(width, device=device, dtype=dtype)[:, None].expand_as(rows)
        cells.append(torch.stack((columns, rows), -1).reshape(-1, 2))
        strides.append(torch.full((len(cells[-1]), 1), float(stride), device=device, dtype=dtype))
        sizes.append(of_scale.repeat(height * width, 1))
    return Grid(torch.cat(cells), torch.cat(strides), torch.cat(sizes))


def decode(raw: Tensor, where: Grid) -> Tensor:
    """(..., P, 4) as (tx, ty, tw, th) to boxes (..., P, 4) as (cx, cy, w, h), by the formulas above."""
    centres = (where.cells + raw[..., :2].sigmoid()) * where.strides
    return torch.cat((centres, where.anchors * raw[..., 2:].clamp(-EXPONENT, EXPONENT).exp()), -1)


def encode(boxes: Tensor, where: Grid, eps: float = 1e-6) -> Tensor:
    """Boxes (P, 4) as (cx, cy, w, h), each in its cell, to (tx, ty, tw, th): the inverse of :func:`decode`.

    Offsets in the cell are kept in [eps, 1 - eps]: a centre on the cell's edge has no finite tx.
    """
    offsets = (boxes[:, :2] / where.strides - where.cells).clamp(eps, 1 - eps)
    return torch.cat((offsets.logit(), (boxes[:, 2:] / where.anchors).log()), -1)


def to_xyxy(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) to (x0, y0, x1, y1)."""
    converted: Tensor = box_convert(boxes, "cxcywh", "xyxy")
    return converted


def to_cxcywh(boxes: Tensor) -> Tensor:
    """(x0, y0, x1, y1) to (cx, cy, w, h)."""
    converted: Tensor = box_convert(boxes, "xyxy", "cxcywh")
    return converted


def coverage(boxes: Tensor, regions: Tensor) -> Tensor:
    """``|box and region| / |box|`` of boxes (P, 4) and regions (n, 4): (P, n). COCO's overlap with a crowd."""
    low = torch.maximum(boxes[:, None, :2], regions[:, :2])
    high = torch.minimum(boxes[:, None, 2:], regions[:, 2:])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return (high - low).clamp_min(0).prod(-1) / areas[:, None].clamp_min(torch.finfo(boxes.dtype).tiny)


@torch.no_grad()
def detect(
    maps: Sequence[Tensor],
    anchors: Sequence[Sequence[float]] = ANCHORS,
    *,
    score: float = 0.05,
    iou: float = 0.5,
    limit: int = 100,
    candidates: int = 1000,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> list[dict[str, Tensor]]:
    """Detections of every image out of raw maps.

    A prediction's score for a class is ``sigmoid(objectness) sigmoid(class)``. Classes do not exclude one another, as
    in YOLOv3: a box may be found for several, and suppression is within a class.

    Args:
        maps: what :class:`xformer.detection.Detector` gives.
        anchors: the model's.
        score: what is not above it is left out.
        iou: of two boxes of a class that overlap more the better one stays.
        limit: detections of one image, the best.
        candidates: before suppression, of one image, the best.
        sizes: (H, W) of every image before padding; boxes are cut there, and those beyond are left out.

    Returns:
        A dict for each image, as torchvision's models give it, best first: boxes (n, 4) as (x0, y0, x1, y1) in pixels,
        scores (n,), labels (n,) from 0.

    Raises:
        UsageError: anchors that are not nine positive pairs. ValueError: maps of other shapes; not a size per image.
    """
    flat = flatten(maps)
    if sizes is not None and len(sizes) != len(flat):
        raise ValueError(f"sizes must be one (H, W) per image, got {len(sizes)} for {len(flat)} images")
    boxes = to_xyxy(decode(flat[..., :4], grid(maps, check_anchors(anchors), flat.dtype)))
    found = []
    for i, (rows, corners) in enumerate(zip(flat, boxes, strict=True)):
        scores = rows[:, 4:5].sigmoid() * rows[:, 5:].sigmoid()
        at, labels = (scores > score).nonzero(as_tuple=True)
        values, best = scores[at, labels].topk(min(candidates, len(at)))
        at, labels = at[best], labels[best]
        corners = corners[at]
        if sizes is not None:
            corners = clip_boxes_to_image(corners, sizes[i])
            inside = (corners[:, 2:] > corners[:, :2]).all(1)
            corners, values, labels = corners[inside], values[inside], labels[inside]
        keep = batched_nms(corners, values, labels, iou)[:limit]
        found.append({"boxes": corners[keep], "scores": values[keep], "labels": labels[keep]})
    return found
