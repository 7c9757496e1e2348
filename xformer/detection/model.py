"""Detector: YOLOv3's three scales (arXiv 1804.02767) on our backbone, with a lightweight neck."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xformer.backbone_model import BackboneModel, padded
from xformer.detection.boxes import ANCHORS, PER_SCALE, STRIDES, check_anchors, check_centre_scale, detect
from xformer.errors import UsageError
from xformer.layers import ConvNorm, Pointwise, init_weights

WIDTHS = (128, 176, 288)
PRIOR = 0.01
"""Objectness of every prediction at initialisation: most predictions are background."""


def separable(channels: int) -> nn.Sequential:
    """Separable version of YOLOv3's 3x3 convolutions: depthwise 3x3, then 1x1. (B, C, H, W) to (B, 2 C, H, W)."""
    return nn.Sequential(ConvNorm(channels, channels, 3, groups=channels), ConvNorm(channels, 2 * channels))


class Scale(nn.Module):
    """One scale: (B, I, H, W) to the features passed to the next finer scale, (B, C, H, W), and the raw map.

    ::

        neck  1x1 -> separable 3x3 -> 1x1 -> separable 3x3 -> 1x1      C -> 2 C -> C in between
        head  separable 3x3 -> 1x1 with bias, without norm or activation
    """

    def __init__(self, in_chans: int, width: int, outputs: int) -> None:
        super().__init__()
        self.neck = nn.Sequential(
            ConvNorm(in_chans, width),
            separable(width),
            ConvNorm(2 * width, width),
            separable(width),
            ConvNorm(2 * width, width),
        )
        self.head = separable(width)
        self.predict = Pointwise(2 * width, outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.neck(x)
        return x, self.predict(self.head(x))


class Detector(BackboneModel):
    """Images (B, in_chans, H, W) to three raw maps (B, 3 (5 + num_classes), H/s, W/s), with strides s = 8, 16, 32.

    ::

        features at stride 32 ------------------------> scale -> map
                 at stride 16 -> concatenate(x, up) --> scale -> map      up: 1x1, nearest, from the coarser scale
                 at stride  8 -> concatenate(x, up) --> scale -> map

    Channel ``a (5 + num_classes) + k`` of a map is output k of anchor a: x, y, w, h, objectness, then classes, all
    before any sigmoid (:mod:`xformer.detection.boxes`). Images whose sides are not multiples of 32 are zero-padded at
    the right and bottom, so that pixel coordinates do not change: H and W above are then those of the padded image.

    Anchors are not in the state dict: like the classes, they are an option of the model.

    Args:
        backbone_name: a name in :data:`xformer.VARIANTS`, or ``timm:NAME`` for a model of timm.
        num_classes: number of object classes, without background.
        anchors: nine (w, h) in pixels: three for stride 8, then three for 16, then three for 32.
        in_chans: number of image channels.
        widths: C of the scales with strides 8, 16 and 32.
        centre_scale: size of the range of a predicted centre in cells (:mod:`xformer.detection.boxes`).
        options: options of the backbone (:class:`xformer.XFormer`).

    Raises:
        UsageError: unknown backbone, num_classes below 1, anchors that are not nine pairs of positive numbers, not
            three positive widths, a centre_scale outside [1, 4], a backbone without maps of the strides 8, 16, 32.
        ValueError: options rejected by the backbone.
    """

    output_names = tuple(f"map_stride_{stride}" for stride in STRIDES)
    """Names of the outputs in exported files."""

    def __init__(
        self,
        backbone_name: str = "xformer_s",
        num_classes: int = 80,
        anchors: Sequence[Sequence[float]] = ANCHORS,
        *,
        in_chans: int = 3,
        widths: Sequence[int] = WIDTHS,
        centre_scale: float = 1.0,
        **options: Any,
    ) -> None:
        if num_classes < 1:
            raise UsageError(f"num_classes must be 1 or more, got {num_classes}")
        if len(widths) != len(STRIDES) or min(widths) < 1:
            raise UsageError(f"widths must be {len(STRIDES)} positive numbers, got {tuple(widths)}")
        super().__init__(backbone_name, STRIDES, in_chans, **options)
        self.num_classes = num_classes
        self.anchors = check_anchors(anchors)
        self.centre_scale = check_centre_scale(centre_scale)
        outputs = PER_SCALE * (5 + num_classes)
        from_above = (*widths[:-1], 0)
        self.scales = nn.ModuleList(
            Scale(channels + more, width, outputs)
            for channels, more, width in zip(self.feature_info.channels(), from_above, widths, strict=True)
        )
        self.laterals = nn.ModuleList(ConvNorm(above, width) for width, above in pairwise(widths))
        self._init()

    @torch.no_grad()
    def _init(self) -> None:
        """Initialise predictions to be near objectness PRIOR, class probability 1 / num_classes, the anchors."""
        init_weights(self.scales)
        init_weights(self.laterals)
        for scale in self.scales:
            assert isinstance(scale, Scale)
            nn.init.normal_(scale.predict.weight, std=0.01)
            bias = scale.predict.bias.view(PER_SCALE, 5 + self.num_classes)
            bias[:, 4] = math.log(PRIOR / (1 - PRIOR))
            bias[:, 5:] = -math.log(max(1, self.num_classes - 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.backbone(padded(x, STRIDES[-1]))
        y, coarsest = self.scales[-1](features[-1])
        maps = [coarsest]
        for i in reversed(range(len(features) - 1)):
            up = F.interpolate(self.laterals[i](y), scale_factor=2.0, mode="nearest")
            y, finer = self.scales[i](torch.cat((features[i], up), 1))
            maps.insert(0, finer)
        return maps

    def detect(self, maps: Sequence[Tensor], **options: Any) -> list[dict[str, Tensor]]:
        """:func:`xformer.detection.detect` with the anchors and the centre scale of this model."""
        return detect(maps, self.anchors, centre_scale=self.centre_scale, **options)
