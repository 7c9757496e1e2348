"""Reference implementations: every public function in differentiable eager PyTorch, for any device and floating dtype.

In float64 they are the oracle of the tests; they are also the "eager" baseline of the benchmarks, and serve calls that
no kernel supports. Arguments are those of :mod:`xformer_kernels.functional`, already checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xformer_kernels.spec import Spec


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, norms and maps: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def xfa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    *,
    map: str = "query_key",
    norm: str = "token",
    activation: str = "softmax",
    eps: float = 1e-12,
    token_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    map_fn: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """See :func:`xformer_kernels.xfa`; implemented as in timm's ``XCA``, in the dtype of the inputs."""
    q, k, v = (masked(x, token_mask) for x in (q, k, v))
    if norm != "none":
        dim = -2 if norm == "token" else -1
        # an eps that rounds to 0 in this dtype would give NaN for a zero norm
        eps = max(eps, torch.finfo(q.dtype).smallest_normal * torch.finfo(q.dtype).eps)
        q, k = F.normalize(q, dim=dim, eps=eps), F.normalize(k, dim=dim, eps=eps)
    left, right = (q, k) if map == "query_key" else (k, v)
    S = (left.transpose(-2, -1) @ right) * temperature.reshape(-1, 1, 1)
    A = map_fn(S.to(accumulate_dtype(q.dtype))) if map_fn is not None else activate(S, Spec(map, norm, activation))
    A = F.dropout(A, dropout_p).to(v.dtype)
    out = A @ v.transpose(-2, -1) if map == "query_key" else A.transpose(-2, -1) @ q.transpose(-2, -1)
    # from (B, H, D, N) to the documented (B, N, H, D) memory
    out = out.permute(0, 3, 1, 2).contiguous().transpose(1, 2)
    return masked(out, token_mask)


def xfa_layer(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    temperature: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    **choices: Any,
) -> Tensor:
    """See :func:`xformer_kernels.xfa_layer`; `choices` are the keyword arguments of :func:`xfa`."""
    q, k, v = (
        t.unflatten(-1, (temperature.numel(), -1)).transpose(1, 2)
        for t in F.linear(x, qkv_weight, qkv_bias).chunk(3, dim=-1)
    )
    return F.linear(xfa(q, k, v, temperature, **choices).transpose(1, 2).flatten(2), proj_weight, proj_bias)


def xfa_block(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    temperature: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    layer_scale: Tensor | None = None,
    *,
    ln_eps: float | None = 1e-6,
    residual: bool = True,
    **choices: Any,
) -> Tensor:
    """See :func:`xformer_kernels.xfa_block`; no layer norm if ``ln_eps`` is None, x is added only if ``residual``."""
    normalised = F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, ln_eps) if ln_eps is not None else x
    y = xfa_layer(normalised, qkv_weight, qkv_bias, temperature, proj_weight, proj_bias, **choices)
    y = y if layer_scale is None else y * layer_scale
    return x + y if residual else y


def activate(S: Tensor, spec: Spec) -> Tensor:
    """The map A from the scaled map S: softmax over the key features, or S itself."""
    return S.softmax(-1) if spec.softmax else S


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str | tuple[str, str] = "relu",
    normalize: bool = True,
    scale: float = 1.0,
    eps: float = 1e-6,
    query_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> Tensor:
    """See :func:`xformer_kernels.linear_attention`; in the accumulate dtype, implemented as in the models."""
    dtype, wide = q.dtype, accumulate_dtype(q.dtype)
    of_q, of_k = feature_maps(feature_map)
    q = features(masked(q, query_mask).to(wide), of_q)
    k, v = (masked(x, token_mask).to(wide) for x in (k, v))
    if of_k == "softmax_tokens" and token_mask is not None:
        # finite where all tokens are masked, so that their softmax has a gradient
        takes_part = token_mask | ~token_mask.any(1, keepdim=True)
        k = torch.where(takes_part[:, None, :, None], k, float("-inf"))
    k = masked(features(k, of_k), token_mask)
    out = scale * (q @ (k.transpose(-2, -1) @ v))
    if normalize:
        out = out / (q @ k.sum(-2).unsqueeze(-1) + eps)
    out = out.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    return masked(out, query_mask)


def feature_maps(feature_map: str | tuple[str, str]) -> tuple[str, str]:
    """The feature maps of q and of k."""
    if isinstance(feature_map, tuple):
        return feature_map
    return "softmax_features" if feature_map == "softmax_tokens" else feature_map, feature_map


def features(x: Tensor, feature_map: str) -> Tensor:
    """The feature map of (B, H, N, D) tokens."""
    if feature_map == "relu":
        return x.relu()
    if feature_map == "elu1":
        above = x > 0
        return torch.where(above, x + 1, torch.where(above, 0, x).exp())  # elu(x) + 1 would cancel
    if feature_map == "softmax_features":
        return x.softmax(-1)
    return x.softmax(-2) if feature_map == "softmax_tokens" else x


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, N, D) tokens with zeros where the (B, N) mask is False."""
    return x if mask is None else torch.where(mask[:, None, :, None], x, 0)


def column_sums(x: Tensor, token_mask: Tensor | None) -> Tensor:
    """Sums over the tokens of (B, H, N, D), in the accumulate dtype: (B, H, D)."""
    return masked(x, token_mask).sum(-2, dtype=accumulate_dtype(x.dtype))


def gram(
    a: Tensor, b: Tensor, *, symmetric: bool = False, token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`xformer_kernels.gram`; (B, H, N, D) operands."""
    dtype = accumulate_dtype(a.dtype)
    a, b = (masked(x.to(dtype), token_mask) for x in (a, b))
    return a.transpose(-2, -1) @ b, a.square().sum(-2), b.square().sum(-2)


def channel_mix(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    add_scale: Tensor | None = None,
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
) -> Tensor:
    """See :func:`xformer_kernels.channel_mix`; (B, H, N, I) tokens, (B, H, O, I) weights, (B, H, O) bias and scale."""
    dtype = accumulate_dtype(x.dtype)
    y = x.to(dtype) @ weight.to(dtype).transpose(-2, -1)
    if x2 is not None and weight2 is not None:
        y = y + x2.to(dtype) @ weight2.to(dtype).transpose(-2, -1)
    if bias is not None:
        y = y + bias.to(dtype).unsqueeze(-2)
    if add is not None:
        y = y + (add.to(dtype) if add_scale is None else add.to(dtype) * add_scale.to(dtype).unsqueeze(-2))
    return y.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)
