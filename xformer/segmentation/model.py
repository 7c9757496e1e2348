"""Segmentation model: the backbone with all four scales, and the decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xformer.backbone import XFormerFeatures
from xformer.errors import UsageError
from xformer.registry import build, default_cfgs
from xformer.segmentation.decoder import Decoder, upsample


class Segmenter(nn.Module):
    """Images (B, in_chans, H, W) to logits (B, num_classes, ceil(H / 4), ceil(W / 4)).

    Any size is supported, also odd ones. ``predict`` returns logits at the size of the image.

    Args:
        backbone_name: "xformer_s", "xformer_xs" or "xformer_xxs".
        num_classes, width, drop_rate, form: see :class:`xformer.segmentation.Decoder`.
        backbone: options of :class:`xformer.XFormerFeatures`: ``in_chans``, ``attention``, ``drop_path_rate`` ...

    Raises:
        UsageError: unknown backbone, num_classes or width below 1.
        ValueError: raised by the decoder or the backbone.
    """

    def __init__(
        self,
        backbone_name: str = "xformer_s",
        num_classes: int = 19,
        width: int = 256,
        *,
        drop_rate: float = 0.1,
        form: str = "commuted",
        **backbone: Any,
    ) -> None:
        super().__init__()
        if backbone_name not in default_cfgs:
            raise UsageError(f"backbone_name must be one of {', '.join(default_cfgs)}, got {backbone_name!r}")
        if num_classes < 1 or width < 1:
            raise UsageError(f"num_classes and width must be 1 or more, got {num_classes} and {width}")
        features = build(backbone_name, features_only=True, **backbone)
        assert isinstance(features, XFormerFeatures)
        self.backbone_name, self.num_classes = backbone_name, num_classes
        self.backbone = features
        self.feature_info = info = features.feature_info
        self.decoder = Decoder(info.channels(), info.reduction(), num_classes, width, drop_rate, form)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.backbone(x))
        return logits

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes, H, W) at the size of the images, in float32 or higher precision."""
        logits = self(images)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return upsample(logits, self.feature_info.reduction(0), images.shape[2:])

    @torch.no_grad()
    def whole_image(self, images: Tensor) -> Tensor:
        """:meth:`predict` without gradients."""
        return self.predict(images)

    @torch.no_grad()
    def sliding_window(
        self, images: Tensor, window: tuple[int, int] = (1024, 1024), stride: tuple[int, int] = (768, 768)
    ) -> Tensor:
        """Average of the logits of :meth:`predict` over windows, without gradients: (B, num_classes, H, W).

        Windows start every `stride` pixels; the last ones end at the image border. A window larger than the image is
        clipped. Attention is within each window.

        Raises:
            UsageError: window or stride below 1, or a stride larger than the window.
        """
        check_windows(window, stride)
        height, width = images.shape[2:]
        total: Tensor | None = None
        seen = torch.zeros(height, width, device=images.device)
        for top in starts(height, window[0], stride[0]):
            for left in starts(width, window[1], stride[1]):
                rows, columns = slice(top, top + window[0]), slice(left, left + window[1])
                logits = self.predict(images[:, :, rows, columns])
                if total is None:
                    total = logits.new_zeros(*logits.shape[:2], height, width)
                total[:, :, rows, columns] += logits
                seen[rows, columns] += 1
        assert total is not None
        return total / seen

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable activation checkpointing of the backbone's stages."""
        self.backbone.set_grad_checkpointing(enable)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As :meth:`xformer.XFormer.group_matcher`; all parameters outside the backbone are the last group."""
        return self.backbone.group_matcher(coarse, r"^backbone\.")

    def no_weight_decay(self) -> set[str]:
        """Names of the temperatures, which should be excluded from weight decay (timm's convention)."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}


def check_windows(window: tuple[int, int], stride: tuple[int, int]) -> None:
    """Raise UsageError for a window or stride below 1, or a stride larger than the window."""
    if not all(1 <= step <= side for side, step in zip(window, stride, strict=True)):
        raise UsageError(f"stride must be from 1 to the window's side, got stride={stride} for window={window}")


def starts(length: int, window: int, stride: int) -> list[int]:
    """Start positions of windows that cover every pixel: 0, stride, ... and ``length - window``."""
    last = max(0, length - window)
    return [*range(0, last, stride), last]
