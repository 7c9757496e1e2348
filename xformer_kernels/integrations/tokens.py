"""Attention layers over tokens (B, N, C) with XCA's formula in classes other than timm's, computed by the kernels."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from xformer_kernels.functional import xfa
from xformer_kernels.integrations.parts import as_image, has_heads, has_parts, serves_temperature, serves_tensor
from xformer_kernels.layer import xfa_layer
from xformer_kernels.layer.call import Call
from xformer_kernels.modules import dropout_p, runs_forward_of
from xformer_kernels.packed import heads_of


def attention(x: Tensor, qkv: Any, temperature: Tensor, proj: Any, p: float, call: Call) -> Tensor:
    """``proj(xfa(split(qkv(x)), temperature))``; qkv and proj are only called if that runs more than torch's forward.

    `proj` may be a 1x1 convolution; the result is that of a linear layer.
    """
    plain_proj = runs_forward_of(proj, nn.Linear) or (runs_forward_of(proj, nn.Conv2d) and _is_pointwise(proj))
    if runs_forward_of(qkv, nn.Linear) and plain_proj:
        choices = call._replace(dropout_p=p).keywords()
        return xfa_layer(x, qkv.weight, qkv.bias, temperature, proj.weight.flatten(1), proj.bias, **choices)
    y: Tensor = proj(_direct(x, qkv, temperature, p, call).transpose(1, 2).flatten(2))
    return y


def _direct(x: Tensor, qkv: Any, temperature: Tensor, p: float, call: Call) -> Tensor:
    q, k, v = heads_of(qkv(x), temperature.shape[0])
    return xfa(q, k, v, temperature, dropout_p=p, backend=call.backend, **call.spec.of_xfa())


def _is_pointwise(conv: Any) -> bool:
    return bool(
        conv.kernel_size == conv.stride == (1, 1) and conv.padding in ((0, 0), "valid", "same") and conv.groups == 1
    )


# ------------------------------------------------------------------------------------- facebookresearch/xcit and copies


def is_xca_shaped(module: Any) -> bool:
    return has_parts(
        module, qkv=nn.Linear, attn_drop=nn.Module, proj=nn.Linear, proj_drop=nn.Module
    ) and has_heads(module, "num_heads", "temperature", module.qkv.in_features)  # fmt: skip


def xca_inputs(module: Any) -> tuple[Any, ...]:
    return ((2, 6, module.qkv.in_features),)


# ------------------------------------------------------------------------------------------------ vit-pytorch's XCiT


def vit_xca(module: Any, call: Call, x: Tensor) -> Tensor:
    """``XCAttention``: layer norm, temperatures exp(t), heads of any width; (B, ..., C) to (B, ..., C)."""
    sizes, out = x.shape[1:-1], module.to_out
    tokens, temperature = module.norm(x.flatten(1, -2)), module.temperature.exp()
    p = dropout_p(module.dropout) or 0.0
    if runs_forward_of(out, nn.Sequential):
        y = attention(tokens, module.to_qkv, temperature, out[0], p, call).unflatten(1, sizes)
        for part in list(out)[1:]:
            y = part(y)
        return y
    y = out(_direct(tokens, module.to_qkv, temperature, p, call).transpose(1, 2).flatten(2).unflatten(1, sizes))
    return y


def is_vit_xca_shaped(module: Any) -> bool:
    if not has_parts(
        module, norm=nn.Module, to_qkv=nn.Linear, attend=nn.Softmax, dropout=nn.Module, to_out=nn.Sequential
    ):
        return False
    to_qkv: Any = module.to_qkv
    out: Any = module.to_out
    return (
        to_qkv.out_features % 3 == 0
        and has_heads(module, "heads", "temperature", to_qkv.out_features // 3)
        and len(out) > 0
        and isinstance(out[0], nn.Linear)
    )


def vit_xca_inputs(module: Any) -> tuple[Any, ...]:
    return ((2, 6, module.to_qkv.in_features),)


def serves_vit_xca(module: Any, x: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and x.dim() >= 3
        and serves_tensor(x, x.dim())
        and serves_temperature(module.temperature, module.heads)
        and runs_forward_of(module.attend, nn.Softmax)
        and module.attend.dim in (-1, 3)
        and dropout_p(module.dropout) is not None
    )


# ------------------------------------------------------------------------------------------------- FDAT, DITN and DAT


def fdat(module: Any, call: Call, x: Tensor, H: Any, W: Any) -> Tensor:
    """FDAT's ``FastChannelAttention``, (B, N, C) to (B, N, C)."""
    return attention(x, module.qkv, module.temp, module.proj, 0.0, call)


def is_fdat_shaped(module: Any) -> bool:
    return has_parts(module, qkv=nn.Linear, proj=nn.Linear) and has_heads(module, "nh", "temp", module.qkv.in_features)


def fdat_inputs(module: Any) -> tuple[Any, ...]:
    return ((2, 6, module.qkv.in_features), 2, 3)


def serves_fdat(module: Any, x: Any, H: Any, W: Any) -> bool:
    return serves_tensor(x, 3) and serves_temperature(module.temp, module.nh)


def isa(module: Any, call: Call, x: Tensor) -> Tensor:
    """DITN's ``ISA``, one head of all channels; (B, C, h, w) to (B, C, h, w)."""
    tokens, sizes = x.flatten(2).transpose(1, 2), x.shape[2:]
    if runs_forward_of(module.qkv, nn.Linear) and runs_forward_of(module.project_out, nn.Conv2d):
        y = attention(tokens, module.qkv, module.temperature, module.project_out, 0.0, call)
        return as_image(y.unsqueeze(1), sizes, x)
    out = _direct(tokens, module.qkv, module.temperature, 0.0, call)
    result: Tensor = module.project_out(as_image(out, sizes, x))
    return result


def is_isa_shaped(module: Any) -> bool:
    t: Any = getattr(module, "temperature", None)
    return (
        has_parts(module, qkv=nn.Linear, project_out=nn.Conv2d)
        and isinstance(t, Tensor)
        and t.shape == (1, 1, 1)
        and _is_pointwise(module.project_out)
    )


def isa_inputs(module: Any) -> tuple[Any, ...]:
    return ((2, module.qkv.in_features, 3, 5),)


def serves_isa(module: Any, x: Any) -> bool:
    return serves_tensor(x, 4) and serves_temperature(module.temperature, 1) and _takes_linear(module.project_out)


def _takes_linear(project_out: Any) -> bool:
    return not runs_forward_of(project_out, nn.Conv2d) or _is_pointwise(project_out)


def dat(module: Any, call: Call, x: Tensor, H: Any, W: Any) -> Tensor:
    """DAT's ``Adaptive_Channel_Attention``: attention and a convolution of v, each gated by the other.

    (B, N, C) to (B, N, C).
    """
    shape = (x.shape[0], x.shape[2], H, W)
    q, k, v = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    p = dropout_p(module.attn_drop) or 0.0
    out = xfa(q, k, v, module.temperature, dropout_p=p, backend=call.backend).transpose(1, 2).flatten(2)
    conv = module.dwconv(v.transpose(-2, -1).reshape(shape))
    channel_gate = module.channel_interaction(out.transpose(-2, -1).reshape(shape))
    spatial_gate = module.spatial_interaction(conv).flatten(2).transpose(-2, -1)
    mixed = out * F.sigmoid(spatial_gate) + (conv * F.sigmoid(channel_gate)).flatten(2).transpose(-2, -1)
    y: Tensor = module.proj_drop(module.proj(mixed))
    return y


def is_dat_shaped(module: Any) -> bool:
    drops, convolutions = (
        dict.fromkeys(("attn_drop", "proj_drop"), nn.Module),
        dict.fromkeys(("dwconv", "channel_interaction", "spatial_interaction"), nn.Sequential),
    )
    return has_parts(module, qkv=nn.Linear, proj=nn.Linear, **drops, **convolutions) and has_heads(
        module, "num_heads", "temperature", module.qkv.in_features
    )


def dat_inputs(module: Any) -> tuple[Any, ...]:
    return ((2, 6, module.qkv.in_features), 2, 3)


def serves_dat(module: Any, x: Any, H: Any, W: Any) -> bool:
    return (
        serves_tensor(x, 3)
        and serves_temperature(module.temperature, module.num_heads)
        and dropout_p(module.attn_drop) is not None
    )
