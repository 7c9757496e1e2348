"""Models of other libraries optimised for inference, in the way :func:`xformer.fuse_for_inference` does it for ours.

Softmax attention and XCA are left as they are; everything around them is treated like our modules.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from xformer.layers import to_image, to_tokens

# name of an activation's class (timm defines classes of the same names) -> oneDNN's name of it, and its algorithm
ACTIVATIONS = {
    "Identity": ("none", ""),
    "ReLU": ("relu", ""),
    "SiLU": ("swish", ""),
    "Hardswish": ("hardswish", ""),
    "GELU": ("gelu", "none"),
}


def fold(model: nn.Module) -> nn.Module:
    """A copy in eval mode with batch norms folded into the preceding convolutions; uses public APIs only."""
    from timm.layers import BatchNormAct2d, ConvNormAct

    def visit(module: nn.Module) -> None:
        conv = ""  # the name of the previous child, if it is a convolution
        for name, child in module.named_children():
            if isinstance(child, ConvNormAct) and isinstance(child.bn.drop, nn.Identity):
                setattr(module, name, nn.Sequential(fuse_conv_bn_eval(child.conv, child.bn), child.bn.act))
            elif conv and isinstance(child, BatchNormAct2d) and isinstance(child.drop, nn.Identity):
                setattr(module, conv, nn.Sequential(fuse_conv_bn_eval(getattr(module, conv), child), child.act))
                setattr(module, name, nn.Identity())
            elif conv and type(child) is nn.BatchNorm2d:
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), child))
                setattr(module, name, nn.Identity())
            else:
                visit(child)
            conv = name if type(child) is nn.Conv2d else ""

    folded = copy.deepcopy(model).eval()
    visit(folded)
    return folded


def fuse(model: nn.Module) -> nn.Module:
    """Like :func:`fold`, with operators of oneDNN that are private to torch. Without gradients, in float32.

    Convolutions and linear layers are fused with the activation that follows; 1x1 convolutions become linear layers
    over pixels.
    """

    def visit(module: nn.Module) -> None:
        # torchvision's has fc1, fc2, activation, and calls activation between the two
        misordered = type(module).__name__ == "SqueezeExcitation"
        last: tuple[str, nn.Module] | None = None  # name and module of the previous child, if it can be fused
        for name, child in module.named_children():
            if type(child) is nn.Identity:
                continue
            parts = list(child) if type(child) is nn.Sequential and len(child) == 2 else [child]
            fused = FUSED.get(type(parts[0]))
            if fused and len(parts) == 1:
                setattr(module, name, fused(child, nn.Identity()))
            elif fused and _known(parts[1]):
                setattr(module, name, fused(*parts))
            elif last and _known(child) and not misordered:
                setattr(module, last[0], FUSED[type(last[1])](last[1], child))
                setattr(module, name, nn.Identity())
            else:
                visit(child)
            last = (name, child) if type(child) in FUSED else None

    fused = fold(model)
    visit(fused)
    return fused


def _known(act: nn.Module) -> bool:
    return type(act).__name__ in ACTIVATIONS


class Linear(nn.Module):
    """``act(linear(x))``."""

    def __init__(self, linear: nn.Linear, act: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.act, self.algorithm = ACTIVATIONS[type(act).__name__]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.act, [], self.algorithm)
        return y


class Conv(nn.Module):
    """``act(conv(x))``."""

    def __init__(self, conv: nn.Conv2d, act: nn.Module) -> None:
        super().__init__()
        self.pointwise = conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1
        self.weight, self.bias = conv.weight, conv.bias
        if self.pointwise:
            self.weight = nn.Parameter(conv.weight.detach().flatten(1).contiguous())
        self.act, self.algorithm = ACTIVATIONS[type(act).__name__]
        assert not isinstance(conv.padding, str)
        self.shape = list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor
        if self.pointwise:
            x = x.contiguous(memory_format=torch.channels_last)
            y = torch.ops.mkldnn._linear_pointwise(to_tokens(x), self.weight, self.bias, self.act, [], self.algorithm)
            return to_image(y, x.shape[2], x.shape[3])
        y = torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *self.shape, self.act, [], self.algorithm
        )
        return y


FUSED: dict[type[nn.Module], Any] = {nn.Conv2d: Conv, nn.Linear: Linear}
