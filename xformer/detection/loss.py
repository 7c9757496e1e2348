"""YOLOv3's assignment of boxes to predictions, and its losses.

Targets are a list of dicts, one per image, as in torchvision's detection models: boxes (n, 4) as (x0, y0, x1, y1) in
pixels, labels (n,) int64 from 0 (there is no background class), and optionally iscrowd (n,) bool.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou, complete_box_iou_loss

from xformer.detection import boxes as coding
from xformer.detection.boxes import ANCHORS, PER_SCALE, STRIDES, Grid, iou, shape_iou, to_cxcywh, to_xyxy
from xformer.errors import UsageError

BOX = ("ciou", "yolov3")
OBJECTNESS = ("one", "iou")
Target = Mapping[str, Tensor]


def assign(
    sizes: Sequence[tuple[int, int]],
    boxes: Tensor,
    anchors: Tensor,
    *,
    centre_scale: float = 1.0,
    anchor_iou: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Assign the boxes of an image to predictions.

    A box is assigned to the anchor, of all nine, whose shape has the largest IoU with it, and to all others above
    `anchor_iou`; for each of them to the cell that contains its centre, and to all others whose predictions can have
    this centre. A centre on or outside the border is in the nearest cell. A prediction is assigned at most one box: if
    several boxes match it, one whose centre is in the cell, then the one with the largest IoU of shapes, then the last.

    With the defaults, which are YOLOv3's, a box is assigned to one prediction.

    Args:
        sizes: (rows, columns) of the three maps. boxes: (n, 4) as (cx, cy, w, h). anchors: (9, 2).
        centre_scale: centre scale of the model.
        anchor_iou: IoU of shapes above which a box is assigned to an anchor.

    Returns:
        Indices of predictions (m,) and of boxes (m,), in the order of predictions.
    """
    shapes = torch.tensor(sizes, device=boxes.device)
    strides = torch.tensor(STRIDES, device=boxes.device)
    counts = shapes.prod(1) * PER_SCALE
    overlap = shape_iou(boxes[:, 2:], anchors)
    chosen = (overlap > anchor_iou).scatter(1, overlap.argmax(1, keepdim=True), True)
    number, anchor = chosen.nonzero(as_tuple=True)
    scale = anchor // PER_SCALE
    size = shapes[scale].flip(1)
    centres = boxes[number, :2] / strides[scale, None]
    own = torch.minimum(centres.floor().long().clamp_min(0), size - 1)
    reach = math.ceil((centre_scale - 1) / 2)
    steps = torch.arange(-reach, reach + 1, device=boxes.device)
    cells = own[:, None] + torch.cartesian_prod(steps, steps).view(-1, 2)
    apart = (centres[:, None] - cells - 0.5).abs().amax(-1)
    inside = ((cells >= 0) & (cells < size[:, None])).all(-1)
    central = (cells == own[:, None]).all(-1)
    kept = central | (inside & (apart < centre_scale / 2))
    match, _ = kept.nonzero(as_tuple=True)
    column, row = cells[kept].unbind(1)
    number, anchor, scale, central = number[match], anchor[match], scale[match], central[kept]
    at = (counts.cumsum(0) - counts)[scale] + (row * shapes[scale, 1] + column) * PER_SCALE + anchor % PER_SCALE
    # of each prediction the last of its matches, from the least to the most preferred
    order = (central + overlap[number, anchor]).argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=boxes.device))
    best = rank.new_full((int(counts.sum()),), -1).scatter_reduce(0, at, rank, "amax")
    at = (best >= 0).nonzero().squeeze(1)
    return at, number[order[best[at]]]


class DetectionLoss(nn.Module):
    """Raw maps and targets to a dict of three losses; their sum is the training loss.

    ::

        loss of an image = sum over predictions / max(1, boxes assigned in it);   loss = mean over images

        objectness  BCE with target 1 or IoU for assigned predictions and 0 for others; ignored ones are excluded
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

    With the defaults, boxes are assigned as in YOLOv3, each to one prediction. The recipes assign a box to several
    (``centre_scale=2, anchor_iou=0.5``), and train the objectness of a prediction to be the IoU of its box
    (``objectness="iou"``, as in YOLOv1), by which detections are ranked. ``python -m
    experiments.ablation`` measures what each changes.

    Losses are computed in float32 even under autocast (in float64 for float64 maps).

    Args:
        anchors: anchors of the model. box: "ciou" or "yolov3".
        ignore: IoU with a box above which unassigned predictions are ignored.
        weights: of the box, objectness and class losses. Initially, CIoU is about 1 and BCE several; the original uses
            1 for all.
        objectness: target of an assigned prediction: "one", or "iou" for the IoU of its box with the assigned one,
            through which no gradient flows.
        anchor_iou: IoU of shapes above which a box is assigned to an anchor besides the best one (:func:`assign`).
        centre_scale: centre scale of the model (:mod:`xformer.detection.boxes`).

    Raises:
        UsageError: anchors are not nine positive pairs, unknown box loss or objectness, negative weights, `ignore` or
            `anchor_iou` outside [0, 1], or a centre_scale outside [1, 4].
    """

    def __init__(
        self,
        anchors: Sequence[Sequence[float]] = ANCHORS,
        box: str = "ciou",
        ignore: float = 0.5,
        weights: tuple[float, float, float] = (5.0, 1.0, 1.0),
        *,
        objectness: str = "one",
        anchor_iou: float = 1.0,
        centre_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if box not in BOX:
            raise UsageError(f"box must be one of {', '.join(BOX)}, got {box!r}")
        if objectness not in OBJECTNESS:
            raise UsageError(f"objectness must be one of {', '.join(OBJECTNESS)}, got {objectness!r}")
        for name, value in (("ignore", ignore), ("anchor_iou", anchor_iou)):
            if not 0 <= value <= 1:
                raise UsageError(f"{name} must be in [0, 1], got {value}")
        if len(weights) != 3 or not all(w >= 0 for w in weights):
            raise UsageError(f"weights must be three numbers, 0 or more, got {weights}")
        self.anchors, self.box, self.ignore, self.weights = coding.check_anchors(anchors), box, ignore, weights
        self.objectness, self.anchor_iou = objectness, anchor_iou
        self.centre_scale = coding.check_centre_scale(centre_scale)

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
        where = coding.grid(maps, self.anchors, flat.dtype, self.centre_scale)
        sizes = [(m.shape[2], m.shape[3]) for m in maps]
        table = torch.tensor(self.anchors, dtype=flat.dtype, device=flat.device)
        empty = flat[:0].sum()
        parts = [[empty], [empty], [empty]]
        for rows, target in zip(flat, targets, strict=True):
            boxes = target["boxes"].to(flat)
            labels = target["labels"].to(flat.device)
            crowd = target.get("iscrowd", torch.zeros_like(labels)).to(flat.device).bool()
            boxes, labels, crowds = boxes[~crowd], labels[~crowd], boxes[crowd]
            at, number = assign(
                sizes, to_cxcywh(boxes), table, centre_scale=self.centre_scale, anchor_iou=self.anchor_iou
            )
            found, cells, share = rows[at], where.take(at), 1 / max(1, len(at))
            assigned = torch.zeros_like(rows[:, 4]).index_fill(0, at, 1)
            counted = ~self._ignored(rows, where, boxes, crowds) | (assigned > 0)
            if self.objectness == "iou":
                with torch.no_grad():
                    assigned[at] = iou(to_xyxy(coding.decode(found[:, :4], cells)), boxes[number])
            objectness = F.binary_cross_entropy_with_logits(rows[:, 4], assigned, reduction="none")
            one_hot = F.one_hot(labels[number], rows.shape[1] - 5).to(rows)
            classes = F.binary_cross_entropy_with_logits(found[:, 5:], one_hot, reduction="sum")
            area = float(STRIDES[0] ** 2 * sizes[0][0] * sizes[0][1])
            box = self._box(found[:, :4], cells, boxes[number], area)
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
