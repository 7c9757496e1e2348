"""Segmentation models of other libraries, with random weights, which the bench of segmentation measures beside ours."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

OTHERS = {
    "lraspp_mobilenet_v3_large": "another model: torchvision's LR-ASPP on MobileNetV3, random weights",
    "segformer_b0": "another model: transformers' SegFormer in the layout of B0, random weights; its attention, with "
    "reduced keys and values, by scaled_dot_product_attention",
}
B0: dict[str, Any] = {
    "depths": [2, 2, 2, 2],
    "hidden_sizes": [32, 64, 160, 256],
    "num_attention_heads": [1, 2, 5, 8],
    "sr_ratios": [8, 4, 2, 1],
    "mlp_ratios": [4, 4, 4, 4],
    "decoder_hidden_size": 256,
    "attn_implementation": "sdpa",
}
PACKAGES = {"lraspp_mobilenet_v3_large": "torchvision", "segformer_b0": "transformers"}


def missing(name: str) -> str:
    """The package that a model of :data:`OTHERS` needs, if it is not installed; empty if it is."""
    return "" if importlib.util.find_spec(PACKAGES[name]) else PACKAGES[name]


class WholeImage(nn.Module):
    """Images (B, 3, H, W) to logits (B, classes, H, W) of a model with ``predict``, of torchvision or transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        predict: Callable[[Tensor], Tensor] | None = getattr(self.model, "predict", None)
        if predict:
            return predict(x)
        found = self.model(x)
        if "out" in found:  # torchvision's models upsample their logits
            of_image: Tensor = found["out"]
            return of_image
        return F.interpolate(found["logits"], size=x.shape[2:], mode="bilinear", align_corners=False)


def build(name: str, classes: int) -> nn.Module:
    """A model of :data:`OTHERS`, in eval mode."""
    if name == "segformer_b0":
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

        options: dict[str, Any] = {**B0, "num_labels": classes}
        return SegformerForSemanticSegmentation(SegformerConfig(**options)).eval()
    from torchvision.models import get_model

    model: nn.Module = get_model(name, weights=None, weights_backbone=None, num_classes=classes)
    return model.eval()
