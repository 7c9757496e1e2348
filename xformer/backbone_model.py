"""Base class of the models on a backbone with maps of several strides: detection and segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xformer.errors import UsageError
from xformer.registry import build_features


class BackboneModel(nn.Module):
    """A model with a ``backbone`` whose maps have these strides, ``feature_info`` of timm's kind, and timm's methods.

    Args:
        backbone_name, strides, in_chans, options: see :func:`xformer.registry.build_features`.

    Raises:
        UsageError: unknown backbone, or one without maps of these strides.
        ValueError: options rejected by the backbone.
    """

    def __init__(self, backbone_name: str, strides: Sequence[int], in_chans: int = 3, **options: Any) -> None:
        super().__init__()
        self.backbone: Any = build_features(backbone_name, strides, in_chans, **options)
        self.feature_info = self.backbone.feature_info

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As :meth:`xformer.XFormer.set_grad_checkpointing`, for the backbone only."""
        self.backbone.set_grad_checkpointing(enable)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As :meth:`xformer.XFormer.group_matcher`; all parameters outside the backbone are the last group.

        Raises:
            UsageError: the backbone has none.
        """
        if not hasattr(self.backbone, "group_matcher"):
            raise UsageError("layer_decay must be 0: the backbone has no group_matcher")
        matcher: dict[str, Any] = self.backbone.group_matcher(coarse, r"^backbone\.")
        return matcher

    def no_weight_decay(self) -> set[str]:
        """Names of the temperatures, which should be excluded from weight decay (timm's convention)."""
        names: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name in names}


def padded(images: Tensor, stride: int) -> Tensor:
    """Images (B, C, H, W), zero-padded at the right and bottom to the next multiples of `stride`."""
    height, width = ((side + stride - 1) // stride * stride for side in images.shape[2:])
    # with a dynamic size torch.export cannot decide whether padding is needed
    if isinstance(height, torch.SymInt) or isinstance(width, torch.SymInt) or images.shape[2:] != (height, width):
        return F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))
    return images
