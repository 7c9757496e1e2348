"""What a layer in Gram form is made of, besides products of matrices: functions of a backend, or composed ones.

    sample(x, token_mask, layer_norm_eps)
        sum of a few tokens u (B, C), and their number (B, 1), in the accumulate dtype

    gram(a, x, symmetric, token_mask, center, layer_norm_eps)
        G = sum_n a u^T (B, 1, Ca, C), sum_n a (B, 1, Ca), sum_n u (B, 1, C), in the accumulate dtype
    mix(x, weight, bias, add, x2, weight2, center, layer_norm_eps, differentiate)
        y = weight x + weight2 u + bias + add, (B, N, 1, O) in the dtype of x
    maps, maps_backward
        :func:`xformer_kernels.layer.maps.layer_maps` and :func:`xformer_kernels.layer.maps.layer_maps_backward`

u is computed from x (in mix from x2 if given, and otherwise in place of x) while tokens are read: x is layer-normalised
unless ``layer_norm_eps`` is None, then ``center`` (B, C), contiguous, is subtracted if given. Tokens are (B, 1, N, C),
weights (B, 1, O, C), bias (B, 1, O). symmetric: `a` is x, and is replaced by u as well. differentiate: the sum without
``add`` is a gradient with respect to u; y is the gradient with respect to the tokens that u is computed from, plus
``add``. Backends may implement them as ``layer_sample``, ``layer_gram``, ``layer_mix``, ``layer_maps`` and
``layer_maps_backward``. Without these, gram and mix are composed of the backend's ``gram`` and ``channel_mix``, and the
others are eager PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xformer_kernels import backends, dispatch, reference
from xformer_kernels.backends import uncut
from xformer_kernels.layer import maps
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
"""Number of sampled tokens: their mean is about an eighth of the spread away from the mean of all, unless they
coincide with a period of x."""


def sampled(N: int, device: torch.device | None = None) -> Tensor:
    """Indices of FEW of N tokens, unevenly spaced so that they do not coincide with the rows of an image."""
    i = torch.arange(FEW, device=device)
    return i * N // FEW + i * 39 % FEW * (N // FEW) // FEW


def sample(x: Tensor, token_mask: Tensor | None, layer_norm_eps: float | None) -> tuple[Tensor, Tensor]:
    """Sums over the sampled tokens, (B, C), and their number, (B, 1)."""
    if x.shape[1] > FEW:
        at = sampled(x.shape[1], x.device)
        x, token_mask = x[:, at], None if token_mask is None else token_mask[:, at]
    few = tokens(x.to(accumulate_dtype(x.dtype)), None, layer_norm_eps)
    if token_mask is None:
        return few.sum(1), few.new_full((x.shape[0], 1), few.shape[1])
    return torch.where(token_mask.unsqueeze(-1), few, 0).sum(1), token_mask.sum(1, keepdim=True).to(few.dtype)


class Passes(NamedTuple):
    """The functions of a backend."""

    sample: Callable[..., tuple[Tensor, Tensor]]
    gram: Callable[..., tuple[Tensor, Tensor, Tensor]]
    mix: Callable[..., Tensor]
    maps: Callable[..., maps.Maps]
    maps_backward: Callable[..., maps.MapGradients]


def of(backend: str, dtype: torch.dtype, head_dim: int) -> Passes:
    """A backend's own functions; where it has none, composed ones. `dtype`: that of the sums."""
    found = None if backend == "reference" else backends.load(backend)[0]
    otherwise: dict[str, Callable[..., Any]] = {
        "layer_sample": sample,
        "layer_gram": partial(_gram, backend),
        "layer_mix": partial(_mix, backend),
        "layer_maps": maps.layer_maps,
        "layer_maps_backward": maps.layer_maps_backward,
    }
    if found is None:
        return Passes(*otherwise.values())
    eager = () if found.takes_layer_maps(dtype, head_dim) else ("layer_maps", "layer_maps_backward")
    own = {name: None if name in eager else found.function(name) for name in otherwise}
    return Passes(*(own[name] or other for name, other in otherwise.items()))


def with_head(*tensors: Tensor | None) -> list[Tensor | None]:
    """Each tensor with a head dimension of size 1 after the batch dimension."""
    return [None if t is None else t.unsqueeze(1) for t in tensors]


def without_head(y: Tensor) -> Tensor:
    """(B, N, 1, O) as (B, N, O); not a view for autograd, so that the op's result may be modified in place."""
    result: Tensor = torch.ops.aten._unsafe_view(y, (*y.shape[:2], y.shape[3]))
    return result


def _gram(
    backend: str,
    a: Tensor,
    x: Tensor,
    symmetric: bool,
    token_mask: Tensor | None,
    center: Tensor | None,
    layer_norm_eps: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if center is not None or layer_norm_eps is not None:
        x = tokens(x.squeeze(1), center, layer_norm_eps).unsqueeze(1)
    a = x if symmetric else a
    G = _kernel(backend, "gram")(a, x, symmetric, token_mask)[0]
    return G, reference.column_sums(a, token_mask), reference.column_sums(x, token_mask)


def _mix(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    x2: Tensor | None,
    weight2: Tensor | None,
    center: Tensor | None,
    layer_norm_eps: float | None,
    differentiate: bool,
) -> Tensor:
    made_of = x if x2 is None else x2
    if center is not None or layer_norm_eps is not None:
        u = tokens(made_of.squeeze(1), center, layer_norm_eps).unsqueeze(1)
        x, x2 = (u, None) if x2 is None else (x, u)
    through = layer_norm_eps if differentiate else None
    mix = _kernel(backend, "channel_mix")
    y: Tensor = mix(x, weight, bias, add if through is None else None, None, x2, weight2)
    if through is None:
        return y
    y = _layer_norm_backward(y.squeeze(2), made_of.squeeze(1), through).unsqueeze(2)
    return y if add is None else y + add.transpose(1, 2)


def _layer_norm_backward(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    dtype = accumulate_dtype(x.dtype)
    wide = x.to(dtype)
    _, mean, inverse = torch.ops.aten.native_layer_norm(wide, x.shape[-1:], None, None, eps)
    wanted = [True, False, False]
    dx: Tensor = torch.ops.aten.native_layer_norm_backward(
        grad.to(dtype), wide, x.shape[-1:], mean, inverse, None, None, wanted
    )[0]
    return dx.to(x.dtype)


def _reference_gram(a: Tensor, b: Tensor, symmetric: bool, token_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(a.dtype)
    if symmetric:  # the diagonal holds squared norms
        a = b = uncut(a)
    G, ssq_a, ssq_b = reference.gram(a, b, symmetric=symmetric, token_mask=token_mask)
    return G.to(dtype), ssq_a.to(dtype), ssq_b.to(dtype)


def _kernel(backend: str, op: str) -> Any:
    if backend != "reference":
        return dispatch.kernel(backend, op)
    if op == "gram":
        return _reference_gram
    return lambda x, weight, bias, add, add_scale, x2, weight2: reference.channel_mix(
        x, weight, bias=bias, add=add, add_scale=add_scale, x2=x2, weight2=weight2
    ).transpose(1, 2)
