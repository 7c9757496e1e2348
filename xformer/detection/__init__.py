"""Object detection: YOLOv3 (arXiv 1804.02767) on our backbone. Requires torchvision.

    Detector          images to three raw maps
    DetectionLoss     raw maps and targets to losses
    detect            raw maps to boxes, scores and labels
    ANCHORS, kmeans   YOLOv3's anchors for COCO, and k-means to compute anchors for other data

``python -m xformer.detection.anchors`` prints anchors for a file in COCO format. There are no pretrained weights.
"""

from xformer.detection.anchors import kmeans
from xformer.detection.boxes import ANCHORS, detect
from xformer.detection.loss import DetectionLoss
from xformer.detection.model import Detector

__all__ = ["ANCHORS", "DetectionLoss", "Detector", "detect", "kmeans"]
