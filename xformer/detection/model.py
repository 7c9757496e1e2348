"""The detector: YOLOv3's three scales (arXiv 1804.02767) on our backbone, with a light neck."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xformer.backbone import XFormerFeatures
from xformer.detection.boxes import ANCHORS, PER_SCALE, STRIDES, check_anchors
from xformer.errors import UsageError
from xformer.layers import ConvNorm, Pointwise, init_weights
from xformer.registry import build, default_cfgs

WIDTHS = (128, 176, 288)
PRIOR = 0.01
"""Objectness of every prediction before training: few of them are of objects."""


def separable(channels: int) -> nn.Sequential:
    """Depthwise 3x3, then 1x1 to twice the channels: YOLOv3's 3x3 convolution, (B, C, H, W) to (B, 2 C, H, W)."""
    return nn.Sequential(ConvNorm(channels, channels, 3, groups=channels), ConvNorm(channels, 2 * channels))


class Scale(nn.Module):
    """One scale: (B, I, H, W) to what finer scales get, (B, C, H, W), and to the raw map.

    ::

        neck  1x1 -> separable 3x3 -> 1x1 -> separable 3x3 -> 1x1      C -> 2 C -> C between
        head  separable 3x3 -> 1x1, the latter with bias and nothing behind it
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


class Detector(nn.Module):
    """Images (B, in_chans, H, W) to three raw maps (B, 3 (5 + num_classes), H/s, W/s), of strides s = 8, 16, 32.

    ::

        backbone's features at 32 ---------------------> scale -> map
                               at 16 -> concatenate(x, up) -> scale -> map      up: 1x1, nearest, from the scale above
                               at  8 -> concatenate(x, up) -> scale -> map

    Channel ``a (5 + num_classes) + k`` of a map is number k of anchor a: x, y, w, h, objectness, then classes, all
    before any sigmoid (:mod:`xformer.detection.boxes`). Images whose sides are no multiples of 32 are padded with zeros
    on the right and below, so that pixels keep their coordinates: H and W above are then those of the padded image.

    Anchors are in no state dict: they are an option of the model, as its classes are.

    Args:
        backbone_name: a name of :data:`xformer.VARIANTS`.
        num_classes: of the objects, without background.
        anchors: nine (w, h) in pixels: three of the scale of stride 8, then of 16, then of 32.
        in_chans: channels of the images.
        widths: C of the scales of strides 8, 16 and 32.
        options: of the backbone (:class:`xformer.XFormer`).

    Raises:
        UsageError: a backbone that there is not, no class, anchors that are not nine pairs of positive numbers, not
            three positive widths, strides of the backbone other than 8, 16, 32.
        ValueError: options that the backbone refuses.
    """

    output_names = tuple(f"map_stride_{stride}" for stride in STRIDES)
    """Of exported files."""

    def __init__(
        self,
        backbone_name: str = "xformer_s",
        num_classes: int = 80,
        anchors: Sequence[Sequence[float]] = ANCHORS,
        *,
        in_chans: int = 3,
        widths: Sequence[int] = WIDTHS,
        **options: Any,
    ) -> None:
        super().__init__()
        if backbone_name not in default_cfgs:
            raise UsageError(f"backbone_name must be one of {', '.join(default_cfgs)}, got {backbone_name!r}")
        if num_classes < 1:
            raise UsageError(f"num_classes must be 1 or more, got {num_classes}")
        if len(widths) != len(STRIDES) or min(widths) < 1:
            raise UsageError(f"widths must be {len(STRIDES)} positive numbers, got {tuple(widths)}")
        self.num_classes = num_classes
        self.anchors = check_anchors(anchors)
        self.backbone = build(backbone_name, features_only=True, out_indices=(1, 2, 3), in_chans=in_chans, **options)
        assert isinstance(self.backbone, XFormerFeatures)
        self.feature_info = info = self.backbone.feature_info
        if info.reduction() != list(STRIDES):
            raise UsageError(f"stem_stride and stage_strides must give the strides {STRIDES}, got {info.reduction()}")
        outputs = PER_SCALE * (5 + num_classes)
        from_above = (*widths[:-1], 0)
        self.scales = nn.ModuleList(
            Scale(channels + more, width, outputs)
            for channels, more, width in zip(info.channels(), from_above, widths, strict=True)
        )
        self.laterals = nn.ModuleList(ConvNorm(above, width) for width, above in pairwise(widths))
        self._init()

    @torch.no_grad()
    def _init(self) -> None:
        """Raw maps start near their biases: PRIOR as objectness, 1 / num_classes for every class, the anchors."""
        init_weights(self.scales)
        init_weights(self.laterals)
        for scale in self.scales:
            assert isinstance(scale, Scale)
            nn.init.normal_(scale.predict.weight, std=0.01)
            bias = scale.predict.bias.view(PER_SCALE, 5 + self.num_classes)
            bias[:, 4] = math.log(PRIOR / (1 - PRIOR))
            bias[:, 5:] = -math.log(max(1, self.num_classes - 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        height, width = ((side + STRIDES[-1] - 1) // STRIDES[-1] * STRIDES[-1] for side in x.shape[2:])
        # of an open size torch.export cannot know whether there is anything to pad
        if isinstance(height, torch.SymInt) or isinstance(width, torch.SymInt) or x.shape[2:] != (height, width):
            x = F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))
        features = self.backbone(x)
        y, coarsest = self.scales[-1](features[-1])
        maps = [coarsest]
        for i in reversed(range(len(features) - 1)):
            up = F.interpolate(self.laterals[i](y), scale_factor=2.0, mode="nearest")
            y, finer = self.scales[i](torch.cat((features[i], up), 1))
            maps.insert(0, finer)
        return maps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As :meth:`xformer.XFormer.set_grad_checkpointing`, of the backbone alone."""
        self.backbone.set_grad_checkpointing(enable)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As :meth:`xformer.XFormer.group_matcher`; all that is not the backbone is the last group."""
        return self.backbone.group_matcher(coarse, r"^backbone\.")

    def no_weight_decay(self) -> set[str]:
        """Names of the temperatures, which an optimiser should not decay (timm's convention)."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}
