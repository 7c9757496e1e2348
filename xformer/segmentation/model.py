"""Segmentation model: a backbone with all four scales, and the decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xformer.backbone import XFormerFeatures
from xformer.backbone_model import BackboneModel, padded
from xformer.errors import UsageError
from xformer.segmentation.decoder import Decoder, crop, upsample

STRIDES = (4, 8, 16, 32)
"""Of the backbone's maps; the first one is that of the logits."""


class Segmenter(BackboneModel):
    """Images (B, in_chans, H, W) to logits (B, num_classes, ceil(H / 4), ceil(W / 4)).

    Any size is supported that the backbone supports; ours supports all, also odd ones. Stages of some models of timm
    round sizes down: for all of timm's, images are zero-padded at the right and bottom to multiples of 32, and logits
    are cropped. ``predict`` returns logits at the size of the image.

    Args:
        backbone_name: a name in :data:`xformer.VARIANTS`, or ``timm:NAME`` for a model of timm.
        num_classes, width, drop_rate, form: see :class:`xformer.segmentation.Decoder`.
        backbone: options of the backbone: of :class:`xformer.XFormerFeatures` ``in_chans``, ``attention``,
            ``drop_path_rate`` ...

    Raises:
        UsageError: unknown backbone, one without maps of the strides 4, 8, 16, 32, num_classes or width below 1.
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
        if num_classes < 1 or width < 1:
            raise UsageError(f"num_classes and width must be 1 or more, got {num_classes} and {width}")
        super().__init__(backbone_name, STRIDES, **backbone)
        self.backbone_name, self.num_classes = backbone_name, num_classes
        self.decoder = Decoder(self.feature_info.channels(), STRIDES, num_classes, width, drop_rate, form)

    def forward(self, x: Tensor) -> Tensor:
        inputs = x if isinstance(self.backbone, XFormerFeatures) else padded(x, STRIDES[-1])
        logits: Tensor = self.decoder(self.backbone(inputs))
        size = [(side + STRIDES[0] - 1) // STRIDES[0] for side in x.shape[2:]]
        return logits if inputs is x else crop(logits, size)

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes, H, W) at the size of the images, in float32 or higher precision."""
        logits = self(images)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return upsample(logits, STRIDES[0], images.shape[2:])

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


def check_windows(window: tuple[int, int], stride: tuple[int, int]) -> None:
    """Raise UsageError for a window or stride below 1, or a stride larger than the window."""
    if not all(1 <= step <= side for side, step in zip(window, stride, strict=True)):
        raise UsageError(f"stride must be from 1 to the window's side, got stride={stride} for window={window}")


def starts(length: int, window: int, stride: int) -> list[int]:
    """Start positions of windows that cover every pixel: 0, stride, ... and ``length - window``."""
    last = max(0, length - window)
    return [*range(0, last, stride), last]
