"""The channel attention of DaViT and of Florence-2's vision tower: XCA without norms, (B, N, C) to (B, N, C)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xformer_kernels.functional import xfa
from xformer_kernels.integrations.parts import divides, has_parts, serves_tensor
from xformer_kernels.integrations.tokens import attention
from xformer_kernels.layer.call import Call
from xformer_kernels.packed import heads_of
from xformer_kernels.reference import accumulate_dtype
from xformer_kernels.spec import Spec

NO_NORMS = Spec(norm="none")


def channel_attention(module: Any, call: Call, x: Tensor) -> Tensor:
    """timm's ``ChannelAttention``: A = softmax(scale k^T v) and q A^T, which is xfa of (k, v, q)."""
    q, k, v = heads_of(module.qkv(x), module.num_heads)
    scale = _each_head(module.scale, module.num_heads, x)
    out = xfa(k, v, q, scale, backend=call.backend, **NO_NORMS.of_xfa())
    y: Tensor = module.proj(out.transpose(1, 2).flatten(2))
    return y


def is_channel_attention_shaped(module: Any) -> bool:
    return (
        has_parts(module, qkv=nn.Linear, proj=nn.Linear)
        and divides(getattr(module, "num_heads", None), module.qkv.in_features)
        and isinstance(getattr(module, "scale", None), float)
        and not list(module.parameters(recurse=False))
    )


def channel_attention_inputs(module: Any) -> tuple[Any, ...]:
    return ((2, 6, module.qkv.in_features),)


def serves_channel_attention(module: Any, x: Any) -> bool:
    return serves_tensor(x, 3)


def channel_attention_v2(module: Any, call: Call, x: Tensor) -> Tensor:
    """timm's ``ChannelAttentionV2`` and transformers' ``Florence2VisionChannelAttention``: softmax(N^-1/2 q^T k) v."""
    features = x.shape[1] if getattr(module, "dynamic_scale", True) else module.head_dim
    scale = _each_head(features**-0.5, module.groups, x)
    return attention(x, module.qkv, scale, module.proj, 0.0, call._replace(spec=NO_NORMS))


def is_channel_attention_v2_shaped(module: Any) -> bool:
    return (
        has_parts(module, "config", qkv=nn.Linear, proj=nn.Linear)
        and divides(getattr(module, "groups", None), module.qkv.in_features)
        and not list(module.parameters(recurse=False))
    )


def serves_channel_attention_v2(module: Any, x: Any) -> bool:
    """transformers' own attention functions all have the same formula, but users may register others."""
    function = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return serves_tensor(x, 3) and x.shape[1] > 0 and function in (None, "eager", "sdpa")


def _each_head(scale: Any, heads: int, x: Tensor) -> Tensor:
    return torch.full((heads,), scale, dtype=accumulate_dtype(x.dtype), device=x.device)
