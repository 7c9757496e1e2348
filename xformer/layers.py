"""Layers of the backbone other than attention.

Images are (B, C, H, W) in channels_last memory format, so that converting them to tokens (B, H W, C) and back only
makes views. 1x1 convolutions are implemented as linear layers over tokens: no library has to detect that they are, and
oneDNN rejects small ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from xformer_kernels import XFA
from xformer_kernels.modules import runs_forward_of


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H W, C): a view of channels_last memory."""
    return x.flatten(2).transpose(1, 2)


def to_image(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, H W, C) to (B, C, H, W) in channels_last memory: a view of contiguous tokens."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


class Pointwise(nn.Linear):
    """1x1 convolution: (B, I, H, W) to (B, O, H, W), as a single matrix product over all tokens of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class HardSwish(nn.Module):
    """``x relu6(x + 3) / 6``. Not in place, since a hook of the previous layer may have kept x."""

    def forward(self, x: Tensor) -> Tensor:
        return F.hardswish(x)


class Foldable(nn.Module):
    """Base class of modules with a batch norm that can be folded into the layers before it."""

    def fold(self) -> None:
        """Fold in place, using running statistics. No-op if already folded or if these layers were modified."""
        raise NotImplementedError


@torch.no_grad()
def norm_folded(layer: nn.Conv2d | nn.Linear, bn: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Weight and bias, in float64, of the single layer that computes ``bn(layer(x))`` with running statistics.

    None if `bn` is not a batch norm or has no running statistics, or if either module has hooks or a parametrized
    weight.
    """
    if not isinstance(bn, (nn.BatchNorm2d, nn.SyncBatchNorm)) or bn.running_mean is None or bn.running_var is None:
        return None
    if not runs_forward_of(bn, type(bn)) or not any(runs_forward_of(layer, kind) for kind in (nn.Conv2d, Pointwise)):
        return None
    mean, var = bn.running_mean.double(), bn.running_var.double()  # the rest is promoted
    return fuse_conv_bn_weights(layer.weight.double(), layer.bias, mean, var, bn.eps, bn.weight, bn.bias)


@torch.no_grad()
def set_weights(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Copy weight and bias into a layer of the same shape and convert to its dtype; adds the bias if it has none."""
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)


class ConvNorm(Foldable):
    """``act(bn(conv(x)))``: convolution without bias, batch norm and optionally hard-swish.

    Args:
        in_chans, out_chans: number of channels.
        kernel: kernel size; 1 uses :class:`Pointwise` if stride and groups are 1.
        stride: stride of the convolution; the output has ``ceil(size / stride)`` pixels per side.
        groups: groups of the convolution; ``in_chans`` for depthwise.
        act: apply hard-swish.
    """

    def __init__(
        self, in_chans: int, out_chans: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True
    ) -> None:
        super().__init__()
        self.conv: nn.Conv2d | Pointwise
        if kernel == 1 and stride == 1 and groups == 1:
            self.conv = Pointwise(in_chans, out_chans, bias=False)
        else:
            self.conv = nn.Conv2d(in_chans, out_chans, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(out_chans)
        self.act = HardSwish() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.bn(self.conv(x)))
        return y

    def fold(self) -> None:
        folded = norm_folded(self.conv, self.bn)
        if folded is not None:
            set_weights(self.conv, *folded)
            self.bn = nn.Identity()


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: scales channels by a gate computed from their means, (B, C, H, W) to the same shape."""

    def __init__(self, channels: int, ratio: float = 0.25) -> None:
        super().__init__()
        hidden = max(8, int(channels * ratio + 4) // 8 * 8)
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.hardsigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class DropPath(nn.Module):  # not timm's: the backbone imports without timm
    """Zeros whole samples with probability ``drop_prob`` in training and scales the rest by 1 / (1 - drop_prob)."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f"drop_prob must be in [0, 1), got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        return x * (x.new_empty((x.shape[0], *(1,) * (x.dim() - 1))).bernoulli_(keep) / keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}"


class MBConv(nn.Module):
    """Inverted residual: 1x1 to ``expand`` times the channels, depthwise, 1x1 back; plus x where the shapes agree."""

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        expand: int,
        kernel: int = 3,
        stride: int = 1,
        se: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = in_chans * expand
        self.expand = ConvNorm(in_chans, hidden)
        self.depthwise = ConvNorm(hidden, hidden, kernel, stride, groups=hidden)
        self.se = SqueezeExcite(hidden) if se else nn.Identity()
        self.project = ConvNorm(hidden, out_chans, act=False)
        self.skip = stride == 1 and in_chans == out_chans
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.se(self.depthwise(self.expand(x))))
        return x + self.drop_path(y) if self.skip else y


class Mlp(nn.Module):
    """The half block ``x + drop_path(fc2(hardswish(fc1(norm(x)))))`` on tokens (B, N, C)."""

    def __init__(self, dim: int, ratio: float = 2.0, drop: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = HardSwish()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.drop(self.fc2(self.act(self.fc1(self.norm(x))))))


class XFBlock(nn.Module):
    """Local convolution, then transformer layers over all tokens, with a residual: (B, C, H, W) to the same shape.

    ::

        t = tokens(reduce(dw3x3_bn(x)))                      C -> D features, H W tokens, a view
        t = t + attention(norm(t));  t = t + mlp(norm(t))    `depth` times
        y = x + bn(expand(norm(t)))                          D -> C

    Attention over features ignores positions: only the depthwise convolution mixes neighbouring pixels.

    Args:
        channels: C. dim: D.
        attention: called as (dim, drop_path); returns the attention half block, (B, N, D) to (B, N, D).
        mlp_ratio, drop: ratio and dropout of the MLPs.
        drop_path: one probability per layer (their number is the depth); the last one is also that of the block.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        attention: Callable[[int, float], nn.Module],
        mlp_ratio: float = 2.0,
        drop: float = 0.0,
        drop_path: tuple[float, ...] = (0.0,),
    ) -> None:
        super().__init__()
        if dim * mlp_ratio < 1:
            raise ValueError(f"mlp_ratio must be at least 1 / {dim} for {dim} features, got {mlp_ratio}")
        self.local = ConvNorm(channels, channels, 3, groups=channels, act=False)
        self.reduce = nn.Linear(channels, dim)
        self.layers = nn.Sequential(
            *(nn.Sequential(attention(dim, p), Mlp(dim, mlp_ratio, drop, p)) for p in drop_path)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.expand = ConvNorm(dim, channels, act=False)
        self.drop_path = DropPath(drop_path[-1])

    def forward(self, x: Tensor) -> Tensor:
        t = self.layers(self.reduce(to_tokens(self.local(x))))
        return x + self.drop_path(self.expand(to_image(self.norm(t), x.shape[2], x.shape[3])))


@torch.no_grad()
def init_weights(model: nn.Module, zero_init_last: bool = False) -> None:
    """Convolutions, also 1x1: normal, scaled by fan-out; other linear layers: truncated normal, std 0.02; biases: 0.

    zero_init_last: set the weight of the last batch norm of each :class:`XFBlock` and residual :class:`MBConv` to 0.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, Pointwise)):
            fan_out = module.weight.shape[0] * module.weight[0, 0].numel()
            groups = module.groups if isinstance(module, nn.Conv2d) else 1
            nn.init.normal_(module.weight, std=(2 * groups / fan_out) ** 0.5)
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, XFA):
            nn.init.ones_(module.temperature)
        elif zero_init_last and isinstance(module, XFBlock):
            nn.init.zeros_(module.expand.bn.get_parameter("weight"))
        elif zero_init_last and isinstance(module, MBConv) and module.skip:
            nn.init.zeros_(module.project.bn.get_parameter("weight"))
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
