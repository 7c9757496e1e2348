"""oneDNN's convolution fused with hard-swish: a private torch operator, which ``torch.compile`` also uses.

Only used on x86, where it was tested. Disabled by ``torch.backends.mkldnn.flags(enabled=False)``.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xformer_kernels import inference, ops


def _is_there() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and platform.machine().lower() in ("x86_64", "amd64")
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


IS_THERE = _is_there()
"""Whether this build of torch has the operator."""


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is used for this call: float32 on the CPU, no autograd, transforms or dispatch modes."""
    return (
        IS_THERE
        and inference.eager_float32(x, weight)
        and torch._C._get_mkldnn_enabled()
        and ops.plain(x, weight)
        and x.numel() > 0  # after plain, since torch.jit.trace records numel
    )


def conv2d(x: Tensor, conv: nn.Conv2d, hard_swish: bool) -> Tensor:
    """``act(conv(x))`` without gradients, for a convolution with zero padding specified as integers."""
    if not serves(x, conv.weight):
        y = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return F.hardswish(y, inplace=True) if hard_swish else y
    shape = [list(part) for part in (conv.padding, conv.stride, conv.dilation)]
    y = torch.ops.mkldnn._convolution_pointwise(
        x, conv.weight, conv.bias, *shape, conv.groups, "hardswish" if hard_swish else "none", [], ""
    )
    return y
