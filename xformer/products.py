"""Linear layers and convolutions with what stands around them, as inference on the CPU wants them.

In float32 without gradients they are single passes of our own (:mod:`xformer_kernels.inference`), or, for large maps
of convolutions that are no products of pixels, oneDNN's convolution with a hard-swish in the same call, which is
private to torch (``torch.ops.mkldnn``) and what ``torch.compile`` calls. Everywhere else they are torch's layers, with
the same results to rounding. ``XFORMER_KERNELS_BACKEND=reference`` turns ours off, and
``torch.backends.mkldnn.flags(enabled=False)`` oneDNN's.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from xformer_kernels import inference, ops
from xformer_kernels.inference import BatchNorm, LayerNorm
from xformer_kernels.layer.call import Projections


def has_onednn() -> bool:
    """Whether this torch has the convolution. It is asked for on x86 alone, where it has been run."""
    return (
        torch.backends.mkldnn.is_available()
        and platform.machine().lower() in ("x86_64", "amd64")
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


HAS_ONEDNN = has_onednn()
MOST = 400_000
"""Outputs of a depthwise convolution up to which our kernel is asked: it is for maps that stay in caches."""


def in_inference() -> bool:
    """Whether layers may be computed at once: no gradients, and nobody writes down what torch does."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and torch._C._get_tracing_state() is None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    batch_norm: BatchNorm | None = None,
    layer_norm: LayerNorm | None = None,
    hard_swish: bool = False,
    add: Tensor | None = None,
) -> Tensor:
    """``act(batch_norm(layer_norm(x) weight^T + bias)) + add``, (..., I) to (..., O)."""
    y = inference.linear(x, weight, bias, batch_norm=batch_norm, layer_norm=layer_norm, hard_swish=hard_swish, add=add)
    if y is None:
        if layer_norm is not None:
            x = F.layer_norm(x, x.shape[-1:], *layer_norm)
        y = _norm_and_act(F.linear(x, weight, bias), -1, batch_norm, hard_swish)
        y = y if add is None else add + y
    return y


def conv2d(x: Tensor, conv: nn.Conv2d, *, batch_norm: BatchNorm | None = None, hard_swish: bool = False) -> Tensor:
    """``act(batch_norm(conv(x)))`` of a convolution that is padded with zeros by whole numbers."""
    weight, bias = conv.weight, conv.bias
    height, width = (-(-side // stride) for side, stride in zip(x.shape[2:], conv.stride, strict=True))
    outputs = x.shape[0] * weight.shape[0] * height * width
    if _is_depthwise(conv) and outputs <= MOST:
        y = inference.depthwise(x, weight, bias, conv.stride[0], batch_norm=batch_norm, hard_swish=hard_swish)
        if y is not None:
            return y
    shape: Any = (conv.padding, conv.stride, conv.dilation, conv.groups)
    # batch norm is folded where outputs are more than weights: the fold is a pass over these
    if asks_onednn(x, weight) and (batch_norm is None or outputs >= weight.numel()):
        if batch_norm is not None:
            mean, variance, scale, shift, eps = batch_norm
            weight, bias = fuse_conv_bn_weights(weight, bias, mean, variance, eps, scale, shift)
        shape = [list(part) if isinstance(part, tuple) else part for part in shape]
        act = "hardswish" if hard_swish else "none"
        folded: Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *shape, act, [], "")
        return folded
    padding, stride, dilation, groups = shape
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return _norm_and_act(y, 1, batch_norm, hard_swish)


def _norm_and_act(y: Tensor, dim: int, norm: BatchNorm | None, hard_swish: bool) -> Tensor:
    if norm is not None:
        y = F.batch_norm(y.movedim(dim, 1), norm.mean, norm.variance, norm.weight, norm.bias, False, 0.0, norm.eps)
        y = y.movedim(1, dim)
    return F.hardswish(y, inplace=not torch.is_grad_enabled()) if hard_swish else y


def _is_depthwise(conv: nn.Conv2d) -> bool:
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and conv.kernel_size == (kernel, kernel)
        and conv.stride == (stride, stride)
        and conv.padding == (kernel // 2, kernel // 2)
        and conv.dilation == (1, 1)
    )


def asks_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN convolves in the place of torch: plain float32 on the CPU, nothing recorded or transformed."""
    return (
        HAS_ONEDNN
        and inference.eager_float32(x, weight)
        and x.numel() > 0
        and torch._C._get_mkldnn_enabled()
        and ops.plain(x, weight)
    )


KERNELS = Projections(linear, inference.asked)
""":func:`linear` for XFA in its direct form."""
