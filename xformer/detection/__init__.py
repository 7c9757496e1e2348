"""Objects in images: YOLOv3 (arXiv 1804.02767) on our backbone. Needs torchvision.

    Detector          images to three raw maps
    DetectionLoss     raw maps and targets to losses
    detect            raw maps to boxes, scores and labels
    ANCHORS, kmeans   YOLOv3's anchors of COCO, and anchors of other data

``python -m xformer.detection.anchors`` prints those of a file of COCO's form. There are no weights to download.
"""

from xformer.detection.anchors import kmeans
from xformer.detection.boxes import ANCHORS, detect
from xformer.detection.loss import DetectionLoss
from xformer.detection.model import Detector

__all__ = ["ANCHORS", "DetectionLoss", "Detector", "detect", "kmeans"]
