"""Linear layers and convolutions as inference on the CPU wants them: oneDNN's, with a hard-swish in the same call.

torch's own linear layers are MKL's there, which are slow on AMD processors. oneDNN's are private to torch
(``torch.ops.mkldnn``); ``torch.compile`` makes the same calls. They serve where :func:`serves` says so, and torch's own
do everywhere else, with the same results to rounding. ``torch.backends.mkldnn.flags(enabled=False)`` turns them off.
"""

from __future__ import annotations

import platform
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import conv_flop_count, flop_registry, register_flop_formula

from xformer_kernels.layer.functional import Projections


def has_onednn() -> bool:
    """Whether this torch has them. They are asked for on x86 alone, where they have been run."""
    return (
        torch.backends.mkldnn.is_available()
        and platform.machine().lower() in ("x86_64", "amd64")
        and all(hasattr(torch.ops.mkldnn, op) for op in ("_linear_pointwise", "_convolution_pointwise"))
    )


HAS_ONEDNN = has_onednn()
FEWEST = 2_500_000
"""Multiply-adds of a linear layer that oneDNN is asked for: below it takes longer to be called than it saves."""


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes a product in the place of torch: of plain float32 on the CPU, without derivatives.

    A compiler fuses on its own, and an exported graph shall be portable.
    """
    return (
        HAS_ONEDNN
        and not torch.is_grad_enabled()
        and x.dtype is weight.dtype is torch.float32
        and x.is_cpu
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and torch._C._get_mkldnn_enabled()
        and x.numel() > 0
    )


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether it does so here and now: a traced graph has torch's operations."""
    return torch._C._get_tracing_state() is None and serves(x, weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: bool = False) -> Tensor:
    """``act(x weight^T + bias)``, (..., I) to (..., O); `act`: hard-swish."""
    if takes(x, weight) and x.numel() * weight.shape[0] >= FEWEST:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, _name(act), [], "")
        return y
    return _plain(F.linear(x, weight, bias), act)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, conv: nn.Conv2d, act: bool = False) -> Tensor:
    """``act(conv(x))`` of a weight and a bias in the place of its own, padded with zeros by whole numbers."""
    if takes(x, weight):
        shape = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *shape, _name(act), [], "")
        return y
    return _plain(F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups), act)


def _plain(y: Tensor, act: bool) -> Tensor:
    return F.hardswish(y, inplace=not torch.is_grad_enabled()) if act else y


def _name(act: bool) -> str:
    return "hardswish" if act else "none"


ONEDNN = Projections(linear, serves, "onednn")
""":func:`linear` for XFA in its direct form."""


def _linear_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * int(weight[0])


def _conv_flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return conv_flop_count(x, weight, out_shape)


if HAS_ONEDNN:
    for _op, _formula in (
        (torch.ops.mkldnn._linear_pointwise, _linear_flops),
        (torch.ops.mkldnn._convolution_pointwise, _conv_flops),
    ):
        if _op not in flop_registry:
            register_flop_formula(_op)(_formula)
