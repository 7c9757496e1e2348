"""Restormer's attention, multi-Dconv head transposed attention (arXiv 2111.09881, section 3.1), by the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xformer_kernels.functional import xfa
from xformer_kernels.layer.call import Call


def mdta(module: Any, call: Call, x: Tensor) -> Tensor:
    """(B, C, h, w) to (B, C, h, w).

    ::

        q, k, v = chunk(qkv_dwconv(qkv(x)));  y = project_out(xfa(q, k, v, temperature)),  the pixels being the tokens

    Parts are the module's: ``temperature`` (H, 1, 1), ``qkv`` (1x1, C to 3C), ``qkv_dwconv`` (depthwise),
    ``project_out`` (1x1). Both memory formats are read in place, and the result has that of the input.
    """
    qkv = module.qkv_dwconv(module.qkv(x))
    h, w = qkv.shape[-2:]
    q, k, v = qkv.flatten(2).unflatten(1, (3, module.num_heads, -1)).transpose(-2, -1).unbind(1)
    out = xfa(q, k, v, module.temperature, backend=call.backend)
    # (B, H, N, D), in (B, N, H, D) memory, to (B, C, h, w): a view if channels_last, else one copy
    pixels = out.transpose(-2, -1).flatten(1, 2).unflatten(-1, (h, w))
    channels_last = qkv.is_contiguous(memory_format=torch.channels_last) and not qkv.is_contiguous()
    y: Tensor = module.project_out(
        pixels.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    )
    return y


def is_mdta_shaped(module: nn.Module) -> bool:
    """Whether the module has MDTA's parts; what its forward computes is for a trial to find out."""
    parts = dict(module.named_children())
    heads, temperature = getattr(module, "num_heads", None), getattr(module, "temperature", None)
    if set(parts) != {"qkv", "qkv_dwconv", "project_out"} or not all(isinstance(m, nn.Conv2d) for m in parts.values()):
        return False
    qkv: Any
    qkv, depthwise, out = parts["qkv"], parts["qkv_dwconv"], parts["project_out"]
    C = qkv.in_channels
    return (
        isinstance(heads, int)
        and heads > 0
        and C % heads == 0
        and isinstance(temperature, Tensor)
        and temperature.shape == (heads, 1, 1)
        and not list(module.named_buffers(recurse=False))
        and qkv.kernel_size == out.kernel_size == (1, 1)
        and qkv.out_channels == depthwise.in_channels == depthwise.out_channels == depthwise.groups == 3 * C
        and out.in_channels == C
    )
