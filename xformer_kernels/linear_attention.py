"""Linear attention with a feature map and an optional denominator: a single op, or gram and channel_mix."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xformer_kernels import autocast, dispatch, functional, linear_ops, ops, reference, repeated, validate
from xformer_kernels.spec import Spec


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
    backend: str = "auto",
) -> Tensor:
    """Linear attention: feature maps of queries and keys replace the softmax over tokens; the state is D x Dv.

    ::

        S[i,j] = sum_m phi_k(k)[m,i] v[m,j]                z[i] = sum_m phi_k(k)[m,i]

        out[n,j] = scale * sum_i phi_q(q)[n,i] S[i,j] / (sum_i phi_q(q)[n,i] z[i] + eps)      normalize=True (default)
        out[n,j] = scale * sum_i phi_q(q)[n,i] S[i,j]                                         normalize=False

        "identity"            phi(x) = x
        "relu"                phi(x) = max(x, 0)                       EfficientViT's LiteMLA, Sana, DC-AE
        "elu1"                phi(x) = elu(x) + 1                      LoFTR
        "softmax_features"    phi(x)[n,i] = exp(x[n,i]) / sum_j exp(x[n,j])
        "softmax_tokens"      phi(x)[n,i] = exp(x[n,i]) / sum_m exp(x[m,i]), for k only

    Args:
        q: (B, H, N, D).
        k, v: (B, H, M, D) and (B, H, M, Dv). q, k and v are on the same device and have the same dtype: float32,
            float64, bfloat16 or float16. Any strides.
        feature_map: the name of both phi_q and phi_k, or a pair of names. "softmax_tokens" is short for
            ("softmax_features", "softmax_tokens"), as in Efficient Attention (arXiv 1812.01243).
        normalize: whether to divide by the denominator.
        scale: multiplies the output, not the denominator.
        eps: above 0, added to the denominator. It is raised to at least the smallest normal number of the accumulate
            dtype (1.2e-38 for float32).
        query_mask: (B, N) bool. Where it is False, the output and the gradient of q are 0, whatever the values of q.
        token_mask: (B, M) bool. Tokens of k and v where it is False are ignored, whatever their values: their gradients
            are 0.
        backend: see :func:`xfa`.

    Returns:
        (B, H, N, Dv) in the dtype of q, with the memory layout that :func:`xfa` returns. Numerators, denominators, S
        and z are float32 (float64 for float64). If the call is composed of :func:`gram` and :func:`channel_mix`, the
        feature maps of 16-bit keys are rounded to the dtype of the keys.

    Differentiable to any order. Autocast, the transforms of ``torch.func`` and tensor subclasses are handled as in
    :func:`xfa`.

    Raises:
        TypeError: an argument has an unsupported type or dtype.
        ValueError: an argument has an invalid shape, device or value; the backend or feature map is unknown.
        RuntimeError: the backend requested by name cannot serve the call; the message lists every reason.
    """
    if isinstance(q, Tensor):
        q, k, v = autocast.cast_tokens(q, k, v)  # type: ignore[assignment]
    signature = None
    if query_mask is None and token_mask is None:
        options = (feature_map, normalize, scale, eps, backend)
        signature = repeated.signature((q, k, v), "linear_attention", *options)
        served: functional.Served | None = repeated.known(signature)
        if served is not None:
            out = ops.call(
                "linear_attention_forward", served.backend, (q, k, v), None, None, served.spec, known_plain=True
            )[0]
            return out.transpose(1, 2)
    spec = Spec.of_linear_attention(feature_map, normalize, scale, eps)
    _validate(q, k, v, query_mask, token_mask)
    spec = spec.with_normal_eps(reference.accumulate_dtype(q.dtype))
    D, Dv = functional.head_dims(q, v)
    name = functional.backend_of(backend, (q, k, v), (q.dtype,), (D, Dv))
    if dispatch.fuses_linear_attention(name, spec.feature_maps, q.dtype, (D, Dv)):
        repeated.remember(signature, functional.Served(name, spec))
        out = ops.call("linear_attention_forward", name, (q, k, v), query_mask, token_mask, spec)[0]
        return out.transpose(1, 2)
    if normalize and name != "reference":  # in the composed form the denominator is one extra feature
        name = functional.backend_of(backend, (q, k, v), (q.dtype,), (D, Dv + 1))
    with autocast.disabled(q):
        if name == "reference":
            functional.note_reference("linear_attention")
            return reference.linear_attention(q, k, v, **spec.of_linear(), query_mask=query_mask, token_mask=token_mask)
        return _composed(q, k, v, spec, query_mask, token_mask, name)


def _composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Spec,
    query_mask: Tensor | None,
    token_mask: Tensor | None,
    backend: str,
) -> Tensor:
    dtype, wide = q.dtype, reference.accumulate_dtype(q.dtype)
    of_q, of_k = spec.feature_maps
    q = reference.masked(q, query_mask)
    k, v = reference.masked(k, token_mask), reference.masked(v, token_mask)
    if of_k == "softmax_tokens":
        features = _exponentials(k, token_mask)
    else:
        features = _features(k, of_k, dtype)
        if of_k not in ("identity", "relu"):  # these two map the zeros of masked tokens to zeros
            features = reference.masked(features, token_mask)
    S, z = linear_ops.gram_and_sum(features, v, backend)
    if of_k == "softmax_tokens":
        some = z != 0
        S, z = S / torch.where(some, z, 1).unsqueeze(-1), some.to(z.dtype)
    weight = (S if spec.scale == 1 else S * spec.scale).transpose(-2, -1)
    if spec.normalize:
        # the denominator is one extra feature; in the wide dtype, as a float16 numerator can overflow although the
        # quotient does not
        weight = torch.cat((weight, z.unsqueeze(-2)), -2)
        bias = F.pad(z.new_full((1,), spec.eps), (v.shape[-1], 0)).expand(weight.shape[:-1])
        both = ops.channel_mix(backend, _features(q, of_q, wide), weight, bias)
        out = linear_ops.quotient(both).to(dtype)
    else:
        out = ops.channel_mix(backend, _features(q, of_q, dtype), weight)
    return reference.masked(out, query_mask)


def _features(x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """phi(x) in `dtype`, rounded once."""
    if name not in ("identity", "relu"):  # these two are exact in any dtype
        x = x.to(reference.accumulate_dtype(x.dtype))
    return reference.features(x, name).to(dtype)


def _exponentials(k: Tensor, token_mask: Tensor | None) -> Tensor:
    """The softmax over tokens without its division: for many tokens, the quotients would underflow in float16."""
    wide = k.to(reference.accumulate_dtype(k.dtype))
    if token_mask is not None:
        wide = torch.where(token_mask[:, None, :, None], wide, float("-inf"))
    if k.shape[2]:
        wide = wide - wide.detach().amax(-2, keepdim=True).clamp_min(torch.finfo(wide.dtype).min)
    return wide.exp().to(k.dtype)


def _validate(q: Any, k: Any, v: Any, query_mask: Any, token_mask: Any) -> None:
    """Checks the tensors of linear_attention."""
    validate.tensor("q", q)
    if q.dim() != 4:
        raise ValueError(f"q must have 4 dimensions, (B, H, N, D), got {q.dim()}: {tuple(q.shape)}")
    B, H, _, D = q.shape
    validate.like("k", k, "q", q)
    if k.dim() != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (B, H, D):
        raise ValueError(
            f"k must have shape (B, H, M, D) with B = {B}, H = {H} and D = {D} as q has, got {tuple(k.shape)}"
        )
    validate.like("v", v, "q", q)
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v must have shape (B, H, M, Dv) with B = {B}, H = {H} and M = {k.shape[2]} as k has, got {tuple(v.shape)}"
        )
    for name, mask, x, meaning in (("query_mask", query_mask, q, "(B, N)"), ("token_mask", token_mask, k, "(B, M)")):
        if mask is not None:
            _mask(name, mask, x, meaning)


def _mask(name: str, mask: Any, x: Tensor, meaning: str) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of bool, got {type(mask).__name__}: {mask!r}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must have dtype torch.bool (False: takes no part), got {mask.dtype}")
    validate.shape(name, mask, (x.shape[0], x.shape[2]), meaning)
    validate.same_device(name, mask, "q", x)
