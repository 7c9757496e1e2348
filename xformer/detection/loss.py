"""YOLOv3's assignment of boxes to predictions, and its losses.

Targets are a list of dicts, one per image, as in torchvision's detection models: boxes (n, 4) as (x0, y0, x1, y1) in
pixels, labels (n,) int64 from 0 (there is no background class), and optionally iscrowd (n,) bool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou, complete_box_iou_loss

from xformer.detection import boxes as coding
from xformer.detection.boxes import ANCHORS, PER_SCALE, STRIDES, Grid, shape_iou, to_cxcywh, to_xyxy
from xformer.errors import UsageError

BOX = ("ciou", "yolov3")
Target = Mapping[str, Tensor]


def assign(sizes: Sequence[tuple[int, int]], boxes: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Assign the boxes of an image to predictions.

    A box is assigned to the anchor, of all nine, whose shape has the largest IoU with it, in the cell that contains its
    centre; a centre on or outside the border is assigned to the nearest cell. A prediction is assigned at most one box:
    if several boxes match it, the last. Boxes with different anchors may share a cell.

    Args:
        sizes: (rows, columns) of the three maps. boxes: (n, 4) as (cx, cy, w, h). anchors: (9, 2).

    Returns:
        Indices of predictions (m,) and of boxes (m,), m <= n, in the order of boxes.
    """
    best = shape_iou(boxes[:, 2:], anchors).argmax(1)
    scale = best // PER_SCALE
    shapes = torch.tensor(sizes, device=boxes.device)
    counts = shapes.prod(1) * PER_SCALE
    rows, columns = shapes[scale].unbind(1)
    cells = (boxes[:, :2] / torch.tensor(STRIDES, device=boxes.device)[scale, None]).floor().long()
    column = torch.minimum(cells[:, 0].clamp_min(0), columns - 1)
    row = torch.minimum(cells[:, 1].clamp_min(0), rows - 1)
    at = (counts.cumsum(0) - counts)[scale] + (row * columns + column) * PER_SCALE + best % PER_SCALE
    number = torch.arange(len(boxes), device=boxes.device)
    last = number.new_full((sum(h * w for h, w in sizes) * PER_SCALE,), -1).scatter_reduce(0, at, number, "amax")
    keep = last[at] == number
    return at[keep], number[keep]


class DetectionLoss(nn.Module):
    """Raw maps and targets to a dict of three losses; their sum is the training loss.

    ::

        loss of an image = sum over predictions / max(1, boxes assigned in it);   loss = mean over images

        objectness  BCE with target 1 for assigned predictions and 0 for others; ignored ones are excluded
        class       BCE of every class, over assigned predictions
        box         over assigned predictions: "ciou" or "yolov3"

    The loss of an image does not depend on the rest of the batch. So gradients are the same for any batch size, with
    gradient accumulation, and in data-parallel training with equally many images per process; and images with many
    boxes do not weigh more than images with few.

    Unassigned predictions are ignored if their IoU with any box of the image is above `ignore`, or if more than half of
    their area is in a crowd. Crowds are not used otherwise: no prediction is assigned to one.

    The default box loss is CIoU (arXiv 1911.08287): it is based on IoU, by which detections are evaluated, weights
    boxes of all sizes equally, and needs no balancing of centres and sizes. "yolov3" is the original loss: BCE of the
    offsets within the cell, plus half the squared error of tw and th, both multiplied by 2 - area of the box / area of
    the image, to raise the weight of small boxes. The entropy of the target is subtracted from this BCE: gradients are
    unchanged, and a perfect prediction has loss zero. Neither was chosen by measured accuracy.

    Losses are computed in float32 even under autocast (in float64 for float64 maps).

    Args:
        anchors: anchors of the model. box: "ciou" or "yolov3".
        ignore: IoU with a box above which unassigned predictions are ignored.
        weights: of the box, objectness and class losses. Initially, CIoU is about 1 and BCE several; the original uses
            1 for all.

    Raises:
        UsageError: anchors are not nine positive pairs, unknown box loss, negative weights, or `ignore` outside [0, 1].
    """

    def __init__(
        self,
        anchors: Sequence[Sequence[float]] = ANCHORS,
        box: str = "ciou",
        ignore: float = 0.5,
        weights: tuple[float, float, float] = (5.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        if box not in BOX:
            raise UsageError(f"box must be one of {', '.join(BOX)}, got {box!r}")
        if not 0 <= ignore <= 1:
            raise UsageError(f"ignore must be in [0, 1], got {ignore}")
        if len(weights) != 3 or not all(w >= 0 for w in weights):
            raise UsageError(f"weights must be three numbers, 0 or more, got {weights}")
        self.anchors, self.box, self.ignore, self.weights = coding.check_anchors(anchors), box, ignore, weights

    def forward(self, maps: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Return the weighted scalar losses "box", "objectness" and "class"; zeros for an empty batch.

        Raises:
            ValueError: invalid maps (see :func:`xformer.detection.boxes.flatten`) or targets (:func:`check_targets`).
        """
        with torch.autocast(maps[0].device.type, enabled=False):
            flat = coding.flatten(maps)
            check_targets(targets, len(flat), flat.shape[-1] - 5)
            return self._losses(flat, maps, targets)

    def _losses(self, flat: Tensor, maps: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        where = coding.grid(maps, self.anchors, flat.dtype)
        sizes = [(m.shape[2], m.shape[3]) for m in maps]
        table = torch.tensor(self.anchors, dtype=flat.dtype, device=flat.device)
        empty = flat[:0].sum()
        parts = [[empty], [empty], [empty]]
        for rows, target in zip(flat, targets, strict=True):
            boxes = target["boxes"].to(flat)
            labels = target["labels"].to(flat.device)
            crowd = target.get("iscrowd", torch.zeros_like(labels)).to(flat.device).bool()
            boxes, labels, crowds = boxes[~crowd], labels[~crowd], boxes[crowd]
            at, number = assign(sizes, to_cxcywh(boxes), table)
            assigned = torch.zeros_like(rows[:, 4]).index_fill(0, at, 1)
            counted = ~self._ignored(rows, where, boxes, crowds) | (assigned > 0)
            objectness = F.binary_cross_entropy_with_logits(rows[:, 4], assigned, reduction="none")
            found, share = rows[at], 1 / max(1, len(at))
            one_hot = F.one_hot(labels[number], rows.shape[1] - 5).to(rows)
            classes = F.binary_cross_entropy_with_logits(found[:, 5:], one_hot, reduction="sum")
            area = float(STRIDES[0] ** 2 * sizes[0][0] * sizes[0][1])
            box = self._box(found[:, :4], where.take(at), boxes[number], area)
            # not multiplied by a mask: the loss of an ignored prediction may be infinite
            background = torch.where(counted, objectness, 0.0).sum()
            for part, value in zip(parts, (box, background, classes), strict=True):
                part.append(value * share)
        return {
            name: weight * torch.stack(part).sum() / max(1, len(flat))
            for name, weight, part in zip(("box", "objectness", "class"), self.weights, parts, strict=True)
        }

    @torch.no_grad()
    def _ignored(self, rows: Tensor, where: Grid, boxes: Tensor, crowds: Tensor) -> Tensor:
        """Mask (P,) of predictions with sufficient IoU with a box, or in a crowd."""
        predicted = to_xyxy(coding.decode(rows[:, :4], where))
        ignored = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        if len(boxes):
            ignored |= box_iou(predicted, boxes).amax(1) > self.ignore
        if len(crowds):
            ignored |= coding.coverage(predicted, crowds).amax(1) > 0.5
        return ignored

    def _box(self, raw: Tensor, where: Grid, boxes: Tensor, area: float) -> Tensor:
        if self.box == "ciou":
            loss: Tensor = complete_box_iou_loss(to_xyxy(coding.decode(raw, where)), boxes, reduction="sum")
            return loss
        centred = to_cxcywh(boxes)
        goal = coding.encode(centred, where)
        offsets = goal[:, :2].sigmoid()
        entropy = F.binary_cross_entropy(offsets, offsets, reduction="none")
        centres = F.binary_cross_entropy_with_logits(raw[:, :2], offsets, reduction="none") - entropy
        shapes = 0.5 * (raw[:, 2:] - goal[:, 2:]).square()
        return ((centres + shapes) * (2 - centred[:, 2:].prod(1, keepdim=True) / area)).sum()


def check_targets(targets: Sequence[Target], images: int, num_classes: int) -> None:
    """Raise ValueError if len(targets) != images, and for wrong shapes or dtypes, boxes without area or not finite,
    and labels out of range."""
    if len(targets) != images:
        raise ValueError(f"targets must be one dict per image, got {len(targets)} for {images} images")
    for i, target in enumerate(targets):
        boxes, labels = target["boxes"], target["labels"]
        if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
            raise ValueError(
                f"boxes of target {i} must be (n, 4) floating point, got {tuple(boxes.shape)} {boxes.dtype}"
            )
        for name in ("labels", "iscrowd"):
            if name in target and target[name].shape != boxes.shape[:1]:
                got, wanted = tuple(target[name].shape), tuple(boxes.shape[:1])
                raise ValueError(f"{name} of target {i} must be of shape {wanted}, as its boxes, got {got}")
        if labels.dtype is not torch.int64:
            raise ValueError(f"labels of target {i} must be int64, got {labels.dtype}")
    if not images:
        return
    boxes = torch.cat([target["boxes"] for target in targets])
    labels = torch.cat([target["labels"] for target in targets])
    wrong = ~((boxes[:, 2:] > boxes[:, :2]).all(1) & boxes.isfinite().all(1))
    if bool(wrong.any()):
        raise ValueError(f"boxes must be finite, x0 < x1 and y0 < y1, got {boxes[wrong][0].tolist()}")
    strange = (labels < 0) | (labels >= num_classes)
    if bool(strange.any()):
        raise ValueError(f"labels must be from 0 to {num_classes - 1}, got {int(labels[strange][0])}")
