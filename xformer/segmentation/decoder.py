"""Segmentation decoder: from the features of several scales to logits, with linear layers only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import add, iadd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xformer.layers import Foldable, HardSwish, Pointwise, init_weights, norm_folded, set_weights
from xformer_kernels.modules import runs_forward_of

FORMS = ("commuted", "concatenated")


def upsample(x: Tensor, factor: int, size: Sequence[int]) -> Tensor:
    """Bilinear upsampling (``align_corners=False``) by an integer factor, cropped: (B, C, h, w) to (B, C, *size).

    Crops at the bottom and right. Stages round sizes up, so the map of an odd-sized image extends beyond the image.
    Scaling by ``size / h`` instead would shift pixels relative to the image, increasingly with the distance from the
    origin and differently for every size.

    Raises:
        ValueError: `size` is larger than ``factor`` times the map.
    """
    height, width = size
    if not _dynamic(size) and (x.shape[2] * factor < height or x.shape[3] * factor < width):
        raise ValueError(f"size must be at most {factor} times the map's {tuple(x.shape[2:])}, got {tuple(size)}")
    if factor == 1:
        return x[:, :, :height, :width]
    larger = (x.shape[2] * factor, x.shape[3] * factor)
    return crop(F.interpolate(x, size=larger, mode="bilinear", align_corners=False), size)


def crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """Remove rows at the bottom and columns at the right: (B, C, H, W) to (B, C, *size), of at most H and W."""
    height, width = size
    if _dynamic(size):  # torch.export cannot prove that the map is large enough for a slice
        rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        return x.index_select(2, rows).index_select(3, columns)
    return x[:, :, :height, :width]


def _dynamic(size: Sequence[int]) -> bool:
    return any(isinstance(side, torch.SymInt) for side in size)


class Decoder(Foldable):
    """Features of several scales to logits at the first one's size (SegFormer's all-MLP decoder, arXiv 2105.15203).

    With ``P_i`` (width x C_i) the layer of scale i, ``[F_1 .. F_n]`` the column blocks of the fusing layer, ``U_i`` the
    upsampling and x_i the features::

        concatenated   y = [F_1 .. F_n] concat_i U_i(P_i x_i)
        commuted       y = sum_i U_i((F_i P_i) x_i)
        logits         = classifier(dropout(hardswish(bn(y))))

    Both forms are the same function of the same parameters: ``U_i`` mixes pixels and the layers mix channels, so they
    commute. The commuted form first multiplies the weights of the two layers, which takes ``width^2 C_i`` multiply-adds
    per call, and needs neither a map of ``n width`` channels nor a product of F with a map. Neither layer has a bias,
    since the batch norm would cancel it.

    Args:
        channels: C_i, starting at the finest scale.
        reductions: strides of the features; each must be a multiple of the first.
        num_classes: number of classes. width: channels of y. drop_rate: channel dropout before the classifier.
        form: "commuted", or "concatenated" for comparison.

    Raises:
        ValueError: unknown form; len(reductions) != len(channels), or one is not a multiple of the first.
    """

    def __init__(
        self,
        channels: Sequence[int],
        reductions: Sequence[int],
        num_classes: int,
        width: int = 256,
        drop_rate: float = 0.1,
        form: str = "commuted",
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form must be one of {FORMS}, got {form!r}")
        if len(channels) != len(reductions) or any(r % reductions[0] for r in reductions):
            raise ValueError(
                f"reductions must be {len(channels)} multiples of the first of them, got {tuple(reductions)}"
            )
        self.form, self.width = form, width
        self.factors = tuple(r // reductions[0] for r in reductions)
        self.project = nn.ModuleList(Pointwise(c, width, bias=False) for c in channels)
        self.fuse: nn.Module = Pointwise(width * len(channels), width, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(width)
        self.act = HardSwish()
        self.drop = nn.Dropout2d(drop_rate)
        self.classifier = Pointwise(width, num_classes)
        init_weights(self)
        for scale, c in zip(self.project, channels, strict=True):  # equal weight for scales with few channels
            nn.init.normal_(scale.get_parameter("weight"), std=c**-0.5)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """(B, C_i, H_i, W_i) of all scales to (B, num_classes, H_1, W_1)."""
        if len(features) != len(self.factors):
            raise ValueError(f"features must be {len(self.factors)} maps, got {len(features)}")
        size = features[0].shape[2:]
        concatenated = self.form == "concatenated"
        maps = self._projected(features) if concatenated else self._summands(features)
        scales = (upsample(x, factor, size) for x, factor in zip(maps, self.factors, strict=True))
        # in place if autograd does not need the summands: at 1024 x 2048 pixels each takes 134 MB
        summed = add if torch.is_grad_enabled() else iadd
        y = self.fuse(torch.cat(list(scales), 1)) if concatenated else reduce(summed, scales)
        logits: Tensor = self.classifier(self.drop(self.act(self.bn(y))))
        return logits

    def _projected(self, features: Sequence[Tensor]) -> Iterator[Tensor]:
        return (project(x) for x, project in zip(features, self.project, strict=True))

    def _summands(self, features: Sequence[Tensor]) -> Iterator[Tensor]:
        """The summands of y, each at the resolution of its scale."""
        if isinstance(self.fuse, nn.Identity):  # folded
            yield from self._projected(features)
            return
        columns = self.fuse.get_parameter("weight").split(self.width, 1)
        for x, fuse, project in zip(features, columns, self.project, strict=True):
            yield F.linear(x.permute(0, 2, 3, 1), fuse @ project.get_parameter("weight")).permute(0, 3, 1, 2)

    @torch.no_grad()
    def fold(self) -> None:
        """Fold batch norm and the fusing layer into the scales' layers: weights become F_i P_i scaled by bn."""
        layers = [p for p in self.project if isinstance(p, Pointwise) and runs_forward_of(p, Pointwise)]
        fuse = self.fuse
        folded = norm_folded(fuse, self.bn) if isinstance(fuse, Pointwise) else None
        if folded is None or len(layers) < len(self.project):
            return
        weight, bias = folded
        for i, (layer, columns) in enumerate(zip(layers, weight.split(self.width, 1), strict=True)):
            set_weights(layer, columns @ layer.weight.double(), bias if i == 0 else None)
        self.form, self.fuse, self.bn = "commuted", nn.Identity(), nn.Identity()
