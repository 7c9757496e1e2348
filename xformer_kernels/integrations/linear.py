"""Linear attention of EfficientViT, Sana, DC-AE and LoFTR, computed by the kernels."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from xformer_kernels import autocast
from xformer_kernels.integrations.parts import has_parts, heads_of_image, is_channels_last, serves_tensor
from xformer_kernels.layer.call import Call
from xformer_kernels.linear_attention import linear_attention
from xformer_kernels.modules import runs_forward_of

# --------------------------------------------------------------------------------------- EfficientViT and DC-AE: scales


def lite_mla(module: Any, call: Call, x: Tensor) -> Tensor:
    """EfficientViT's ``LiteMLA``, (B, C, h, w) to (B, C, h, w).

    ::

        q, k, v = qkv(x), and each of aggreg(qkv(x));    y = proj(relu(q) (relu(k)^T v) / (relu(q) sum relu(k) + eps))
    """
    qkv = module.qkv(x)
    scales = (qkv, *(aggregate(qkv) for aggregate in module.aggreg))
    with autocast.disabled(qkv):
        out = _of_scales(scales, module.dim, module.eps, call.backend)
    if is_channels_last(qkv):
        image = torch.cat([t.transpose(1, 2).flatten(2) for t in out], -1).unflatten(1, x.shape[2:]).movedim(-1, 1)
    else:
        image = torch.cat([t.transpose(-2, -1).flatten(1, 2) for t in out], 1).unflatten(-1, x.shape[2:])
    y: Tensor = module.proj(image)
    return y


def _of_scales(scales: tuple[Tensor, ...], D: int, eps: float, backend: str) -> list[Tensor]:
    """(B, H, N, D) outputs for images of 3 H D channels, in which the q, k and v of a head are adjacent."""
    return [
        linear_attention(*heads_of_image(qkv, (-1, 3, D), 1), feature_map="relu", eps=eps, backend=backend)
        for qkv in scales
    ]


def is_lite_mla_shaped(module: Any) -> bool:
    return (
        has_parts(module, qkv=nn.Module, aggreg=nn.ModuleList, kernel_func=nn.ReLU, proj=nn.Module)
        and isinstance(getattr(module, "dim", None), int)
        and isinstance(getattr(module, "eps", None), float)
        and _first_convolution(module.qkv) is not None
    )


def lite_mla_inputs(module: Any) -> tuple[Any, ...]:
    return ((2, _first_convolution(module.qkv).in_channels, *_more_pixels_than(module.dim)),)


def serves_lite_mla(module: Any, x: Any) -> bool:
    return _serves_image(x, module.dim) and module.eps > 0 and runs_forward_of(module.kernel_func, nn.ReLU)


def _first_convolution(module: Any) -> Any:
    return next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)


def _more_pixels_than(D: int) -> tuple[int, int]:
    return 3, D // 3 + 1


def _serves_image(x: Any, D: int) -> bool:
    """MIT's LiteMLA and DC-AE's attention use a different algorithm unless there are more pixels than features."""
    return serves_tensor(x, 4) and x.shape[2] * x.shape[3] > D


def multiscale(attn: Any, call: Call, x: Tensor) -> Tensor:
    """``SanaMultiscaleLinearAttention`` of diffusers' ``AutoencoderDC``, (B, C, h, w) to (B, C, h, w)."""
    pixels = x.movedim(1, -1)
    qkv = torch.cat([attn.to_q(pixels), attn.to_k(pixels), attn.to_v(pixels)], -1).movedim(-1, 1)
    scales = (qkv, *(project(qkv) for project in attn.to_qkv_multiscale))
    out = _of_scales(scales, attn.attention_head_dim, attn.eps, call.backend)
    tokens = torch.cat([t.transpose(1, 2).flatten(2) for t in out], -1).to(x.dtype)
    y: Tensor = attn.to_out(tokens.unflatten(1, x.shape[2:]))
    y = attn.norm_out(y).movedim(-1, 1) if attn.norm_type == "rms_norm" else attn.norm_out(y.movedim(-1, 1))
    return y + x if attn.residual_connection else y


def is_multiscale_shaped(module: Any) -> bool:
    linear = dict.fromkeys(("to_q", "to_k", "to_v", "to_out"), nn.Linear)
    others = {"to_qkv_multiscale": nn.ModuleList, "nonlinearity": nn.ReLU, "norm_out": nn.Module}
    return _has_processor(module, "SanaMultiscaleAttnProcessor2_0") and has_parts(
        module, "processor", **linear, **others
    )


def multiscale_inputs(module: Any) -> tuple[Any, ...]:
    return ((2, module.to_q.in_features, *_more_pixels_than(module.attention_head_dim)),)


def serves_multiscale(attn: Any, x: Any) -> bool:
    return _serves_image(x, attn.attention_head_dim) and attn.eps > 0 and runs_forward_of(attn.nonlinearity, nn.ReLU)


def _has_processor(module: Any, name: str) -> bool:
    """Whether a diffusers module has a processor of this name, which computes its attention; others are not tested."""
    return type(getattr(module, "processor", None)).__name__ == name


# ----------------------------------------------------------------------------------------------------------------- Sana


def sana(attn: Any, call: Call, x: Tensor, source: Tensor | None = None, mask: Any = None) -> Tensor:
    """diffusers' ``SanaLinearAttnProcessor2_0``, which ignores the mask; (B, N, C) and (B, M, C) to (B, N, C)."""
    source = x if source is None else source
    q, k, v = attn.to_q(x), attn.to_k(source), attn.to_v(source)
    if attn.norm_q is not None:
        q = attn.norm_q(q)
    if attn.norm_k is not None:
        k = attn.norm_k(k)
    q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = linear_attention(q, k, v, feature_map="relu", eps=1e-15, backend=call.backend)
    y: Tensor = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2).to(x.dtype)))
    return y.clip(-65504, 65504) if x.dtype == torch.float16 else y


def is_sana_shaped(module: Any) -> bool:
    if not _has_processor(module, "SanaLinearAttnProcessor2_0"):
        return False
    norms = {name: nn.Module for name in ("norm_q", "norm_k") if getattr(module, name, None) is not None}
    linear = dict.fromkeys(("to_q", "to_k", "to_v"), nn.Linear)
    return has_parts(module, "processor", to_out=nn.ModuleList, **linear, **norms)


def sana_inputs(module: Any) -> tuple[Any, ...]:
    return (2, 6, module.to_q.in_features), (2, 7, module.to_k.in_features), None


def serves_sana(attn: Any, x: Any, source: Any, mask: Any) -> bool:
    return serves_tensor(x, 3) and (source is None or serves_tensor(source, 3))


# ---------------------------------------------------------------------------------------------------------------- LoFTR


def loftr(
    module: Any,
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_mask: Tensor | None = None,
    kv_mask: Tensor | None = None,
) -> Tensor:
    """LoFTR's ``LinearAttention``: (B, N, H, D) and two of (B, M, H, D) to (B, N, H, D); masks (B, N) and (B, M)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = linear_attention(
        q, k, v, feature_map="elu1", eps=module.eps, query_mask=q_mask, token_mask=kv_mask, backend=call.backend
    )
    return out.transpose(1, 2)


def is_loftr_shaped(module: Any) -> bool:
    return (
        has_parts(module, "feature_map")
        and _elu_plus_1(module) is not None
        and isinstance(getattr(module, "eps", None), float)
        and not list(module.parameters())
    )


def loftr_inputs(module: Any) -> tuple[Any, ...]:
    q_mask, kv_mask = (torch.arange(2 * n).view(2, n) % 5 != 3 for n in (5, 9))
    return (2, 5, 2, 4), (2, 9, 2, 4), (2, 9, 2, 4), q_mask, kv_mask


def serves_loftr(module: Any, q: Any, k: Any, v: Any, q_mask: Any, kv_mask: Any) -> bool:
    return (
        all(serves_tensor(t, 4) for t in (q, k, v))
        and q.dtype == k.dtype == v.dtype
        and q.shape[::2] == k.shape[::2] == v.shape[::2]
        and q.shape[3] == k.shape[3]
        and k.shape[1] == v.shape[1]
        and all(
            mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == x.shape[:2])
            for mask, x in ((q_mask, q), (kv_mask, k))
        )
        and module.eps > 0
        and module.__dict__.get("feature_map") is _elu_plus_1(module)
    )


def _elu_plus_1(module: Any) -> Any:
    """The function of that name in the Python module of the class, which is the one that was tested."""
    return getattr(sys.modules.get(type(module).__module__), "elu_feature_map", None)
