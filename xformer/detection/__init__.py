"""Object detection: YOLOv3 (arXiv 1804.02767) on our backbone. Requires torchvision.

    Detector          images to three raw maps
    DetectionLoss     raw maps and targets to losses
    detect            raw maps to boxes, scores and labels
    ANCHORS           YOLOv3's anchors for COCO

There are no pretrained weights.
"""

from xformer.detection.boxes import ANCHORS, detect
from xformer.detection.loss import DetectionLoss
from xformer.detection.model import Detector

__all__ = ["ANCHORS", "DetectionLoss", "Detector", "detect"]
