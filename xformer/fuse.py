"""A model as inference wants it: batch norms folded, and on the CPU products with their hard-swish as one operation."""

from __future__ import annotations

import copy
from typing import TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xformer.layers import ConvNorm, Foldable, HardSwish, Mlp, Pointwise
from xformer_kernels import XFA
from xformer_kernels.layer.functional import Projections
from xformer_kernels.nn import untouched

Model = TypeVar("Model", bound=nn.Module)


def has_onednn() -> bool:
    """Whether this torch has oneDNN's products with an activation behind them."""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, op) for op in ("_linear_pointwise", "_convolution_pointwise")
    )


def _takes(x: Tensor, weight: Tensor) -> bool:
    """Only plain eager float32 on the CPU: a compiler fuses on its own, and an exported graph shall be portable."""
    return (
        not torch.is_grad_enabled()
        and x.dtype is weight.dtype is torch.float32
        and x.is_cpu
        and torch._C._get_tracing_state() is None
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and x.numel() > 0
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: bool = False) -> Tensor:
    """``act(linear(x))`` on any number of dimensions, by oneDNN where :func:`_takes` says so: the same result."""
    if _takes(x, weight):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, _name(act), [], "")
        return y
    y = F.linear(x, weight, bias)
    return F.hardswish(y, inplace=not torch.is_grad_enabled()) if act else y


ONEDNN = Projections(linear, _takes, "onednn")


class FusedLinear(nn.Module):
    """:func:`linear` with the same parameters."""

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
    """``act(conv(x))`` likewise."""

    def __init__(self, conv: nn.Conv2d, act: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.act = conv.weight, conv.bias, act
        self.stride, self.padding, self.dilation, self.groups = (
            list(conv.stride), list(map(int, conv.padding)), list(conv.dilation), conv.groups,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if _takes(x, self.weight):
            shape = (self.padding, self.stride, self.dilation, self.groups)
            y: Tensor = torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, *shape, _name(self.act), [], ""
            )
            return y
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return F.hardswish(y, inplace=not torch.is_grad_enabled()) if self.act else y

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, stride={self.stride}, groups={self.groups}, act={self.act}"


def _name(act: bool) -> str:
    return "hardswish" if act else "none"


def fuse_for_inference(model: Model, onednn: bool | None = None) -> Model:
    """A copy in eval mode whose batch norms are part of the convolutions and linear layers before them.

    With `onednn`, linear layers and convolutions take their hard-swish with them, in float32 on the CPU without
    gradients: one oneDNN call instead of a product, its bias and an activation. These calls are the ones that
    ``torch.compile`` makes, and private to torch; where they cannot serve, plain ones do, in compiled and exported
    graphs too. XFA projects by them in its direct form, which it takes where tokens are few.

    Outputs are those of ``model.eval()`` to rounding; the state dict has other names. The copy is not for training:
    there are no batch statistics any more. What has hooks, computed weights or other parts than this package gave it
    stays as it is.

    Args:
        model: any that is made of this package's layers. Of another model's modules, linear layers alone are replaced.
        onednn: None: where torch has it. False: only batch norms are folded.

    Raises:
        RuntimeError: ``onednn=True`` where torch has it not.
    """
    if onednn and not has_onednn():
        raise RuntimeError("onednn=True: this torch was built without oneDNN's fused products; take None or False")
    fused = copy.deepcopy(model).eval()
    for module in fused.modules():
        if isinstance(module, Foldable):
            module.fold()
    if onednn or (onednn is None and has_onednn()):
        _replace(fused)
    return fused


def _replace(module: nn.Module) -> None:
    if isinstance(module, XFA):
        module.projections = ONEDNN
        return
    for name, child in module.named_children():
        if _made(child, ConvNorm, conv=(nn.Conv2d, Pointwise), bn=(nn.Identity,), act=(HardSwish, nn.Identity)):
            act = isinstance(child.act, HardSwish)
            conv = child.conv
            setattr(module, name, FusedPointwise(conv, act) if isinstance(conv, Pointwise) else FusedConv(conv, act))
        elif _made(child, Mlp, fc1=(nn.Linear,), act=(HardSwish,), fc2=(nn.Linear,), drop=(nn.Dropout,)):
            setattr(module, name, FusedMlp(child))
        elif _made(child, Pointwise):
            setattr(module, name, FusedPointwise(child))
        elif _made(child, nn.Linear):
            setattr(module, name, FusedLinear(child))
        else:
            _replace(child)


def _made(module: nn.Module, kind: type[Model], **parts: tuple[type[nn.Module], ...]) -> TypeGuard[Model]:
    """Whether a module is of that very class without hooks, and each of these parts of one of its classes likewise."""
    return untouched(module, kind) and all(
        any(untouched(getattr(module, name), kind) for kind in kinds) for name, kinds in parts.items()
    )
