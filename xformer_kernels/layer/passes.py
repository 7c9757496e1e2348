"""The two passes over tokens that the layer is made of: by a backend that has them, or out of gram and channel_mix.

    gram  G = sum_n a u^T, sum_n a, sum_n u          mix  y = weight x + weight2 u + bias + add

u is made of its tokens while they are read: layer-normalised unless ``layer_norm_eps`` is None, less ``center`` (B, C)
if there is one (contiguous). A backend has them as ``layer_gram`` and ``layer_mix``, with tokens of (B, 1, N, C).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xformer_kernels import backends, dispatch, reference
from xformer_kernels.backends import uncut
from xformer_kernels.reference import accumulate_dtype


def tokens(x: Tensor, center: Tensor | None, layer_norm_eps: float | None) -> Tensor:
    """u, in the dtype of x."""
    wide = x.to(accumulate_dtype(x.dtype))
    if layer_norm_eps is not None:
        wide = F.layer_norm(wide, x.shape[-1:], eps=layer_norm_eps)
    if center is not None:
        wide = wide - center.unsqueeze(1)
    return wide.to(x.dtype)


FEW = 64
"""Tokens that tell about where the mean is: theirs is an eighth of the spread from it, unless they keep step with x."""


def sampled(N: int, device: torch.device | None = None) -> Tensor:
    """Which FEW of N, spread over all at uneven distances, so as not to keep step with rows of an image."""
    i = torch.arange(FEW, device=device)
    return i * N // FEW + i * 39 % FEW * (N // FEW) // FEW


def sample(x: Tensor, token_mask: Tensor | None, layer_norm_eps: float | None) -> tuple[Tensor, Tensor]:
    """Sums over a few tokens, (B, C), and how many, (B, 1)."""
    if x.shape[1] > FEW:
        at = sampled(x.shape[1], x.device)
        x, token_mask = x[:, at], None if token_mask is None else token_mask[:, at]
    few = tokens(x.to(accumulate_dtype(x.dtype)), None, layer_norm_eps)
    if token_mask is None:
        return few.sum(1), few.new_full((x.shape[0], 1), few.shape[1])
    return torch.where(token_mask.unsqueeze(-1), few, 0).sum(1), token_mask.sum(1, keepdim=True).to(few.dtype)


def gram(
    a: Tensor | None,
    x: Tensor,
    token_mask: Tensor | None,
    center: Tensor | None,
    layer_norm_eps: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """G (B, Ca, C), sum_a (B, Ca), sum_u (B, C) in the accumulate dtype; without `a`, u takes its place."""
    fused = _function(backend, "layer_gram")
    x4 = x.unsqueeze(1)
    if fused is not None:
        a4 = x4 if a is None else a.unsqueeze(1)
        result = fused(a4, x4, a is None, token_mask, center, layer_norm_eps)
    else:
        u = x if center is None and layer_norm_eps is None else tokens(x, center, layer_norm_eps)
        left = u if a is None else a
        G = _kernel(backend, "gram")(left.unsqueeze(1), u.unsqueeze(1), a is None, token_mask)[0]
        result = G, *(_sum(t, token_mask).unsqueeze(1) for t in (left, u))
    return result[0].squeeze(1), result[1].squeeze(1), result[2].squeeze(1)


def mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    x2: Tensor | None,
    weight2: Tensor | None,
    center: Tensor | None,
    layer_norm_eps: float | None,
    differentiate: bool,
    backend: str,
) -> Tensor:
    """y (B, N, O) in the dtype of x. u is made of x2, or of x if there is none; weights are (B, O, C), bias (B, O).

    differentiate: the sum without `add` is a gradient with regard to u, and y is the one with regard to x2, and `add`.
    """
    fused = _function(backend, "layer_mix")
    inputs = [None if t is None else t.unsqueeze(1) for t in (x, weight, bias, add, x2, weight2)]
    if fused is not None:
        return _tokens_of(fused(*inputs, center, layer_norm_eps, differentiate))
    if center is not None or layer_norm_eps is not None:
        last = 0 if x2 is None else 4
        inputs[last] = tokens(x if x2 is None else x2, center, layer_norm_eps).unsqueeze(1)
    X, W, b, added, X2, W2 = inputs
    through = layer_norm_eps if differentiate else None
    y = _tokens_of(_kernel(backend, "channel_mix")(X, W, b, added if through is None else None, None, X2, W2))
    if through is None:
        return y
    y = _layer_norm_backward(y, x if x2 is None else x2, through)
    return y if add is None else y + add


def _tokens_of(y: Tensor) -> Tensor:
    """(B, N, 1, O) as (B, N, O), and no view to autograd, for the op's result to be modifiable in place."""
    result: Tensor = torch.ops.aten._unsafe_view(y, (*y.shape[:2], y.shape[3]))
    return result


def _layer_norm_backward(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    dtype = accumulate_dtype(x.dtype)
    wide = x.to(dtype)
    _, mean, inverse = torch.ops.aten.native_layer_norm(wide, x.shape[-1:], None, None, eps)
    wanted = [True, False, False]
    dx: Tensor = torch.ops.aten.native_layer_norm_backward(
        grad.to(dtype), wide, x.shape[-1:], mean, inverse, None, None, wanted
    )[0]
    return dx.to(x.dtype)


def _sum(x: Tensor, token_mask: Tensor | None) -> Tensor:
    x = x if token_mask is None else torch.where(token_mask.unsqueeze(-1), x, 0)
    return x.sum(1, dtype=accumulate_dtype(x.dtype))


def _reference_gram(a: Tensor, b: Tensor, symmetric: bool, token_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(a.dtype)
    if symmetric:  # norms are on its diagonal
        a = b = uncut(a)
    G, ssq_a, ssq_b = reference.gram(a, b, symmetric=symmetric, token_mask=token_mask)
    return G.to(dtype), ssq_a.to(dtype), ssq_b.to(dtype)


def _function(backend: str, name: str) -> Any:
    found = None if backend == "reference" else backends.load(backend)[0]
    return None if found is None else found.function(name)


def _kernel(backend: str, op: str) -> Any:
    if backend != "reference":
        return dispatch.kernel(backend, op)
    if op == "gram":
        return _reference_gram
    return lambda x, weight, bias, add, add_scale, x2, weight2: reference.channel_mix(
        x, weight, bias=bias, add=add, add_scale=add_scale, x2=x2, weight2=weight2
    ).transpose(1, 2)
