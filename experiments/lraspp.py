"""torchvision's LR-ASPP on MobileNetV3 as the task ``lraspp``, to be compared with our segmenter.

Data, loss and metrics are those of ``segment``. The recipe names the model as torchvision does,
``lraspp_mobilenet_v3_large``; its weights are newly initialised.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from xformer.errors import UsageError
from xformer.recipes.tasks import register
from xformer.recipes.tasks.segment import STRIDE, Segment
from xformer.segmentation import upsample

MODEL = "lraspp_mobilenet_v3_large"
FINER = 8 // STRIDE
"""Its logits have stride 8, and the task wants STRIDE."""


class AtStride(nn.Module):
    """Images (B, 3, H, W) to logits (B, num_classes, ceil(H / 4), ceil(W / 4)) of torchvision's model."""

    def __init__(self, num_classes: int) -> None:
        from torchvision.models import get_model

        super().__init__()
        whole = get_model(MODEL, weights=None, weights_backbone=None, num_classes=num_classes)
        self.backbone, self.classifier = whole.backbone, whole.classifier

    def forward(self, x: Tensor) -> Tensor:
        return upsample(self.classifier(self.backbone(x)), FINER, [-(-side // STRIDE) for side in x.shape[2:]])


@register("lraspp")
class Lraspp(Segment):
    """`segment` with another model, which has no options here."""

    unused: ClassVar[tuple[str, ...]] = (*Segment.unused, "model_options", "attention", "drop_path")

    def build(self, **options: Any) -> nn.Module:
        """The model, with fresh weights.

        Raises:
            UsageError: a recipe of another model, or options.
        """
        if self.recipe.model != MODEL or options:
            raise UsageError(f"model must be {MODEL} without options, got {self.recipe.model!r} with {options}")
        return AtStride(len(self.data.classes))
