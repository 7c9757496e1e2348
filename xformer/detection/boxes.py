"""YOLOv3's encoding of boxes, and detections from raw maps.

Boxes are in pixels of the model's input image: (x0, y0, x1, y1), or (cx, cy, w, h) where noted. A prediction
(tx, ty, tw, th) of the cell in column i and row j, with stride s and anchor (aw, ah), is the box

    cx = s (i + c sigmoid(tx) - (c - 1) / 2)     w = aw exp(tw)
    cy = s (j + c sigmoid(ty) - (c - 1) / 2)     h = ah exp(th)

with tw and th clamped to +-EXPONENT. The centre scale c is 1 in YOLOv3: a centre is in the cell of its prediction. With
c = 2 it is at most half a cell outside, and a centre on the edge of a cell has a finite t. The P predictions of all
maps are ordered by stride, then row, column and anchor.
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
"""YOLOv3's anchors for COCO, in pixels of 416 x 416 images."""
EXPONENT = math.log(1000 / 16)
"""A box's sides are at most 62.5 times larger or smaller than those of its anchor."""


def check_anchors(anchors: Sequence[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    """Return the anchors as pairs of floats.

    Raises:
        UsageError: not nine pairs of finite positive numbers.
    """
    pairs = tuple(tuple(float(v) for v in pair) for pair in anchors)
    if len(pairs) != len(ANCHORS) or not all(len(p) == 2 and all(0 < v < math.inf for v in p) for p in pairs):
        raise UsageError(f"anchors must be {len(ANCHORS)} pairs (w, h) of positive numbers, got {pairs}")
    return tuple((p[0], p[1]) for p in pairs)


def check_centre_scale(centre_scale: float) -> float:
    """Return the centre scale.

    Raises:
        UsageError: not a number from 1 to 4.
    """
    number = isinstance(centre_scale, (int, float)) and not isinstance(centre_scale, bool)
    if not number or not 1 <= centre_scale <= 4:
        raise UsageError(f"centre_scale must be a number from 1 to 4, got {centre_scale!r}")
    return float(centre_scale)


def shape_iou(sizes: Tensor, anchors: Tensor) -> Tensor:
    """Pairwise IoU (n, k) of boxes (n, 2) and (k, 2), given as (w, h) with the same centre."""
    common = torch.minimum(sizes[:, None], anchors).prod(-1)
    return common / (sizes.prod(-1)[:, None] + anchors.prod(-1) - common)


class Grid(NamedTuple):
    """Position of predictions: cells (P, 2) as column and row, strides (P, 1), anchors (P, 2) in pixels; and the
    centre scale."""

    cells: Tensor
    strides: Tensor
    anchors: Tensor
    centre_scale: float = 1.0

    def take(self, index: Tensor) -> Grid:
        """The grid of the predictions at `index`."""
        return Grid(self.cells[index], self.strides[index], self.anchors[index], self.centre_scale)


def flatten(maps: Sequence[Tensor]) -> Tensor:
    """Raw maps (B, 3 (5 + classes), H/s, W/s) to (B, P, 5 + classes), in float32, or float64 if the maps are.

    Raises:
        ValueError: not three maps with the same batch size and channels, a multiple of 3 above 15.
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


def grid(
    maps: Sequence[Tensor],
    anchors: Sequence[Sequence[float]],
    dtype: torch.dtype = torch.float32,
    centre_scale: float = 1.0,
) -> Grid:
    """The grid of the predictions of these maps; only their shapes and device are used."""
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
    return Grid(torch.cat(cells), torch.cat(strides), torch.cat(sizes), centre_scale)


def decode(raw: Tensor, where: Grid) -> Tensor:
    """Predictions (..., P, 4) as (tx, ty, tw, th) to boxes (..., P, 4) as (cx, cy, w, h); see the module docstring."""
    c = where.centre_scale
    centres = (where.cells + c * raw[..., :2].sigmoid() - (c - 1) / 2) * where.strides
    return torch.cat((centres, where.anchors * raw[..., 2:].clamp(-EXPONENT, EXPONENT).exp()), -1)


def encode(boxes: Tensor, where: Grid, eps: float = 1e-6) -> Tensor:
    """Boxes (P, 4) as (cx, cy, w, h) to (tx, ty, tw, th): the inverse of :func:`decode`.

    sigmoid(tx) and sigmoid(ty) are clamped to [eps, 1 - eps]: a centre at the end of the range has no finite tx.
    """
    c = where.centre_scale
    offsets = ((boxes[:, :2] / where.strides - where.cells + (c - 1) / 2) / c).clamp(eps, 1 - eps)
    return torch.cat((offsets.logit(), (boxes[:, 2:] / where.anchors).log()), -1)


def to_xyxy(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) to (x0, y0, x1, y1)."""
    converted: Tensor = box_convert(boxes, "cxcywh", "xyxy")
    return converted


def to_cxcywh(boxes: Tensor) -> Tensor:
    """(x0, y0, x1, y1) to (cx, cy, w, h)."""
    converted: Tensor = box_convert(boxes, "xyxy", "cxcywh")
    return converted


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU (n,) of each of the boxes (n, 4) with the box of `others` (n, 4) in its place."""
    low = torch.maximum(boxes[:, :2], others[:, :2])
    common = (torch.minimum(boxes[:, 2:], others[:, 2:]) - low).clamp_min(0).prod(1)
    areas = [(of_it[:, 2:] - of_it[:, :2]).prod(1) for of_it in (boxes, others)]
    return common / (areas[0] + areas[1] - common)


def coverage(boxes: Tensor, regions: Tensor) -> Tensor:
    """``|box and region| / |box|`` (P, n) of boxes (P, 4) and regions (n, 4): COCO's overlap with a crowd."""
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
    centre_scale: float = 1.0,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> list[dict[str, Tensor]]:
    """Decode raw maps to detections, with non-maximum suppression (NMS).

    The score of a prediction for a class is ``sigmoid(objectness) sigmoid(class)``. As in YOLOv3, classes are not
    exclusive: a box may be detected for several classes, and NMS is per class.

    Args:
        maps: output of :class:`xformer.detection.Detector`.
        anchors: anchors of the model.
        score: score threshold; predictions not above it are discarded.
        iou: IoU threshold of NMS.
        limit: maximum number of detections per image.
        candidates: maximum number of predictions per image, by score, before NMS.
        centre_scale: centre scale of the model.
        sizes: (H, W) of every image before padding; boxes are clipped to it, and those outside are discarded.

    Returns:
        A dict for each image, in the format of torchvision's detection models, sorted by decreasing score: boxes (n, 4)
        as (x0, y0, x1, y1) in pixels, scores (n,), labels (n,) from 0.

    Raises:
        UsageError: anchors are not nine positive pairs.
        ValueError: maps with wrong shapes, or not one size per image.
    """
    flat = flatten(maps)
    if sizes is not None and len(sizes) != len(flat):
        raise ValueError(f"sizes must be one (H, W) per image, got {len(sizes)} for {len(flat)} images")
    boxes = to_xyxy(
        decode(flat[..., :4], grid(maps, check_anchors(anchors), flat.dtype, check_centre_scale(centre_scale)))
    )
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
