"""torchvision's SSDLite with MobileNetV3 (arXiv 1905.02244) as the task ``ssdlite``, to be compared with our detector.

Model, assignment, loss and what is made of outputs are torchvision's; images, targets, training and metrics are ours.
Images come to the model as to ours, of the recipe's size and not of the 320 pixels of its name. Its anchors are shares
of an image; here they have as many pixels in crops of other sizes as in images of the recipe's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from xformer.detection.boxes import to_cxcywh, to_xyxy
from xformer.recipes.data.detection import Target, restore
from xformer.recipes.tasks import register
from xformer.recipes.tasks.detect import Detect, MeanAP

Outputs = tuple[dict[str, Tensor], list[Tensor]]


class SsdNet(nn.Module):
    """Images (B, 3, H, W) to the head's outputs and the anchors of each image. Class 0 is background."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.ssd = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=1 + num_classes)

    def forward(self, x: Tensor) -> Outputs:
        features = list(self.ssd.backbone(x).values())
        sizes = [(x.shape[2], x.shape[3])] * len(x)
        anchors = [to_cxcywh(boxes) for boxes in self.ssd.anchor_generator(ImageList(x, sizes), features)]
        scale = x.new_tensor((1, 1, self.image_size / x.shape[3], self.image_size / x.shape[2]))
        return self.ssd.head(features), [to_xyxy(boxes * scale) for boxes in anchors]


class SsdMeanAP(MeanAP):
    """As :class:`MeanAP`, of torchvision's detections."""

    def __init__(self, annotations: Any, ssd: Any) -> None:
        super().__init__(annotations)
        self.ssd = ssd

    def update(self, outputs: Any, targets: Sequence[Target]) -> None:
        found = self.ssd.postprocess_detections(*outputs, [target["size"] for target in targets])
        for of_it, target in zip(found, targets, strict=True):
            boxes = restore(of_it["boxes"], target)
            self.add(target["image_id"], boxes, of_it["scores"], of_it["labels"] - 1)


@register("ssdlite")
class SsdLite(Detect):
    ssd: Any

    def build(self, **options: Any) -> nn.Module:
        net = SsdNet(len(self.data.classes), self.recipe.image_size)
        # for its settings alone: what it does with outputs knows no weights
        self.ssd = net.ssd
        return net

    def loss(self, outputs: Any, targets: Sequence[Target]) -> Tensor:
        """torchvision's two losses, summed. Crowds are left out, as its own training does."""
        head, anchors = outputs
        counted = [
            {"boxes": target["boxes"][~target["iscrowd"]], "labels": target["labels"][~target["iscrowd"]] + 1}
            for target in targets
        ]
        matched = [self._match(of_it["boxes"], own) for of_it, own in zip(counted, anchors, strict=True)]
        losses = self.ssd.compute_loss(counted, {k: v.float() for k, v in head.items()}, anchors, matched)
        total: Tensor = sum(losses.values())
        return total

    def _match(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        if not len(boxes):
            return torch.full((len(anchors),), -1, device=anchors.device)
        matched: Tensor = self.ssd.proposal_matcher(box_iou(boxes, anchors))
        return matched

    def metrics(self, device: Any) -> SsdMeanAP:
        return SsdMeanAP(self.data.held_out, self.ssd)
