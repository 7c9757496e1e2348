"""Restormer's attention, multi-Dconv head transposed attention (arXiv 2111.09881, section 3.1), by the kernels."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from xformer_kernels.functional import xfa
from xformer_kernels.integrations.parts import (
    as_image,
    convolution,
    has_heads,
    has_parts,
    heads_of_image,
    serves_temperature,
    serves_tensor,
)
from xformer_kernels.layer.call import Call
from xformer_kernels.spec import Spec

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.Sequential)


def mdta(module: Any, call: Call, x: Tensor) -> Tensor:
    """(B, C, h, w) to (B, C, h, w), or (B, C, d, h, w).

    ::

        q, k, v = chunk(qkv_dwconv(qkv(x)));  y = project_out(xfa(q, k, v, temperature)),  the pixels being the tokens

    Parts are the module's: ``temperature`` (H, 1, 1), ``qkv`` (1x1, C to 3C), ``qkv_dwconv`` (depthwise),
    ``project_out`` (1x1). Both memory formats are read in place, and the result has that of the input.
    """
    qkv = module.qkv_dwconv(module.qkv(x))
    q, k, v = heads_of_image(qkv, (3, module.num_heads, -1), 0)
    out = xfa(q, k, v, module.temperature, backend=call.backend)
    y: Tensor = module.project_out(as_image(out, qkv.shape[2:], qkv))
    return y


def mdta_by_reference(module: Any, x: Tensor) -> Tensor:
    return mdta(module, Call(Spec(), None, 0.0, "direct", None, "reference"), x)


def is_mdta_shaped(module: nn.Module) -> bool:
    """Whether the module has MDTA's parts, in 2 or 3 dimensions; a trial tests what its forward computes."""
    if not has_parts(module, qkv=_CONVOLUTIONS, qkv_dwconv=_CONVOLUTIONS, project_out=_CONVOLUTIONS):
        return False
    qkv, depthwise, out = (convolution(getattr(module, part)) for part in ("qkv", "qkv_dwconv", "project_out"))
    if qkv is None or depthwise is None or out is None or not type(qkv) is type(depthwise) is type(out):
        return False
    C = qkv.in_channels
    return (
        has_heads(module, "num_heads", "temperature", C)
        and {*qkv.kernel_size, *out.kernel_size} == {1}
        and qkv.out_channels == depthwise.in_channels == depthwise.out_channels == depthwise.groups == 3 * C
        and out.in_channels == C
    )


def mdta_inputs(module: Any) -> tuple[Any, ...]:
    conv = convolution(module.qkv)
    return ((2, conv.in_channels, *((3, 5) if len(conv.kernel_size) == 2 else (2, 3, 4))),)


def serves_mdta(module: Any, x: Any) -> bool:
    chosen = module.__dict__.get("_attention_fn")  # of MONAI's CABlock
    return (
        (serves_tensor(x, 4) or serves_tensor(x, 5))
        and serves_temperature(module.temperature, module.num_heads)
        and (chosen is None or (inspect.ismethod(chosen) and chosen.__func__ is type(module)._normal_attention))
    )
