"""A model as inference wants it: batch norms folded once, and on the CPU all products by :mod:`xformer.products`."""

from __future__ import annotations

import copy
from typing import TypeGuard, TypeVar

from torch import Tensor, nn

from xformer.layers import ConvNorm, Foldable, HardSwish, Linear, Mlp, Pointwise
from xformer.products import ONEDNN, conv2d, has_onednn, linear
from xformer_kernels import XFA
from xformer_kernels.nn import untouched

Model = TypeVar("Model", bound=nn.Module)


class FusedLinear(nn.Module):
    """:func:`xformer.products.linear` with the same parameters."""

    def __init__(self, linear: nn.Linear, act: bool = False) -> None:
        super().__init__()
        self.weight, self.bias, self.act = linear.weight, linear.bias, act

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.act)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, act={self.act}"


class FusedPointwise(FusedLinear):
    """The same on images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FusedMlp(nn.Module):
    """:class:`Mlp` without what it does in training alone: at few tokens calls of modules are a part of its time."""

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = mlp.norm, FusedLinear(mlp.fc1, act=True), FusedLinear(mlp.fc2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.fc2(self.fc1(self.norm(x)))
        return y


class FusedConv(nn.Module):
    """:func:`xformer.products.conv2d` likewise."""

    def __init__(self, conv: nn.Conv2d, act: bool) -> None:
        super().__init__()
        self.conv, self.act = conv, act

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.conv.weight, self.conv.bias, self.conv, self.act)

    def extra_repr(self) -> str:
        return f"act={self.act}"


def fuse_for_inference(model: Model, onednn: bool | None = None) -> Model:
    """A copy in eval mode whose batch norms are part of the convolutions and linear layers before them.

    The layers do much of that by themselves in inference on the CPU, in every call anew (:mod:`xformer.products`); the
    copy has it behind it. With `onednn`, linear layers and convolutions take their hard-swish with them, in float32 on
    the CPU without gradients: one oneDNN call instead of a product, its bias and an activation. XFA projects by such
    calls in its direct form, which it takes where tokens are few. Compiled and exported graphs have none of them.

    Outputs are those of ``model.eval()`` to rounding; the state dict has other names. The copy is not for training:
    there are no batch statistics any more. What has hooks, computed weights or other parts than this package gave it
    stays as it is.

    Args:
        model: any that is made of this package's layers. Of another model's modules, linear layers alone are replaced.
        onednn: None: where torch has it. False: batch norms are folded, and operations are torch's public ones alone.

    Raises:
        RuntimeError: ``onednn=True`` where torch has it not.
    """
    if onednn and not has_onednn():
        raise RuntimeError("onednn=True: this torch was built without oneDNN's fused products; take None or False")
    fused = copy.deepcopy(model).eval()
    for module in fused.modules():
        if isinstance(module, Foldable):
            module.fold()
    use = has_onednn() if onednn is None else onednn
    if use:
        _replace(fused)
    for module in fused.modules():
        if isinstance(module, (ConvNorm, Linear)):
            module.onednn = use
        elif isinstance(module, XFA):
            module.projections = ONEDNN if use else None
    return fused


def _replace(module: nn.Module) -> None:
    if isinstance(module, XFA):
        return
    for name, child in module.named_children():
        if _made(child, ConvNorm, conv=(nn.Conv2d, Pointwise), bn=(nn.Identity,), act=(HardSwish, nn.Identity)):
            act = isinstance(child.act, HardSwish)
            conv = child.conv
            setattr(module, name, FusedPointwise(conv, act) if isinstance(conv, Pointwise) else FusedConv(conv, act))
        elif _made(child, Mlp, fc1=(nn.Linear, Linear), act=(HardSwish,), fc2=(nn.Linear, Linear), drop=(nn.Dropout,)):
            setattr(module, name, FusedMlp(child))
        elif _made(child, nn.Linear):
            setattr(module, name, FusedLinear(child))
        else:
            _replace(child)


def _made(module: nn.Module, kind: type[Model], **parts: tuple[type[nn.Module], ...]) -> TypeGuard[Model]:
    """Whether a module is of that very class without hooks, and each of these parts of one of its classes likewise."""
    return untouched(module, kind) and all(
        any(untouched(getattr(module, name), kind) for kind in kinds) for name, kinds in parts.items()
    )
