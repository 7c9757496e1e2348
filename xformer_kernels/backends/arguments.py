"""Arguments of the compiled modules: newly allocated results, and the addresses, strides and codes of a call.

Shared by the backends that use the C API (csrc/include/xformer_kernels.h, csrc/bindings.h).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xformer_kernels.backends.layouts import Results, empty_gradient, empty_packed
from xformer_kernels.reference import accumulate_dtype
from xformer_kernels.spec import Spec

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_MAPS = {"query_key": 0, "key_value": 1}
NORMS = {"token": 0, "feature": 1, "none": 2}
_ACTIVATIONS = {"softmax": 0, "identity": 1}
FEATURE_MAPS = {"identity": 0, "relu": 1, "elu1": 2, "softmax_features": 3, "softmax_tokens": 4}
_NO_STRIDES = (0, 0, 0, 0)


def _heads_first(t: Tensor) -> tuple[int, int, int, int]:
    """Strides of a (B, N, H, D) tensor, in the order (B, H, N, D)."""
    B, N, H, D = t.stride()
    return B, H, N, D


def _mask(token_mask: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if token_mask is None else (token_mask.data_ptr(), token_mask.stride(0), token_mask.stride(1))


def _optional(tensor: Tensor | None, strides: tuple[int, ...] | None = None) -> tuple[int, tuple[int, ...], int]:
    """Address, strides and dtype code of a tensor that may be absent."""
    if tensor is None:
        return 0, _NO_STRIDES, 0
    return tensor.data_ptr(), strides or tensor.stride(), _DTYPES[tensor.dtype]


def gram(
    results: Results, a: Tensor, b: Tensor, symmetric: bool, token_mask: Tensor | None
) -> tuple[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]]:
    B, H, N, Da = a.shape
    Db = b.shape[-1]
    dtype = accumulate_dtype(a.dtype)
    G, ssq_a, ssq_b = (
        results.empty((B, H, Da, Db), dtype),
        results.empty((B, H, Da), dtype),
        results.empty((B, H, Db), dtype),
    )
    arguments = (
        (B, H, N, Da), Db, _DTYPES[a.dtype], a.data_ptr(), a.stride(), b.data_ptr(), b.stride(), symmetric,
        *_mask(token_mask), G.data_ptr(), ssq_a.data_ptr(), ssq_b.data_ptr(),
    )  # fmt: skip
    return arguments, (G, ssq_a, ssq_b)


def layer_maps(dtype: torch.dtype, map: str, activation: str) -> tuple[int, int, int]:
    """The codes of the choices of a layer's maps."""
    return _DTYPES[dtype], _MAPS[map], _ACTIVATIONS[activation]


def channel_mix(
    results: Results,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    add_scale: Tensor | None,
    x2: Tensor | None,
    weight2: Tensor | None,
) -> tuple[tuple[Any, ...], Tensor]:
    B, H, N, I = x.shape  # noqa: E741
    O = weight.shape[-2]  # noqa: E741
    y = results.empty((B, N, H, O), x.dtype)

    def per_feature(t: Tensor | None) -> tuple[int, tuple[int, ...], int]:
        return _optional(t, None if t is None else (t.stride(0), t.stride(1), 0, t.stride(2)))

    arguments = (
        (B, H, N, I), 0 if x2 is None else x2.shape[-1], O, _DTYPES[x.dtype], x.data_ptr(), x.stride(),
        *_optional(weight), *per_feature(bias), *_optional(add)[:2], *per_feature(add_scale),
        *_optional(x2)[:2], *_optional(weight2), y.data_ptr(), _heads_first(y),
    )  # fmt: skip
    return arguments, y


def choices(spec: Spec) -> tuple[int, int, int, float]:
    """Codes of the map, the norm and the activation; eps."""
    return _MAPS[spec.map], NORMS[spec.norm], _ACTIVATIONS[spec.activation], spec.eps


def _xfa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    stats: Tensor,
    token_mask: Tensor | None,
    spec: Spec,
) -> tuple[Any, ...]:
    """The arguments that forward and backward have in common."""
    return (
        q.shape, _DTYPES[q.dtype], *choices(spec),
        q.data_ptr(), q.stride(), k.data_ptr(), k.stride(), v.data_ptr(), v.stride(),
        temperature.data_ptr(), temperature.stride(0), _DTYPES[temperature.dtype], *_mask(token_mask),
        stats.data_ptr(),
    )  # fmt: skip


def xfa_forward(
    results: Results, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, token_mask: Tensor | None, spec: Spec
) -> tuple[tuple[Any, ...], tuple[Tensor, Tensor]]:
    B, H, _, D = q.shape
    out = results.output(q, k, v)
    stats = results.empty((B, H, D * D + 2 * D), accumulate_dtype(q.dtype))
    return (*_xfa(q, k, v, temperature, stats, token_mask, spec), out.data_ptr(), _heads_first(out)), (out, stats)


def xfa_backward(
    results: Results,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    stats: Tensor,
    token_mask: Tensor | None,
    spec: Spec,
    packed: bool = False,
) -> tuple[tuple[Any, ...], tuple[Tensor, Tensor]]:
    dqkv = results.gradients(q, k, v, packed)
    dq, dk, dv = dqkv.transpose(2, 3).unbind(0)
    dtemperature = results.empty((q.shape[1],), temperature.dtype)
    gradients = (dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), dq.stride(), dtemperature.data_ptr())
    shared = _xfa(q, k, v, temperature, stats, token_mask, spec)
    return (*shared, dout.data_ptr(), dout.stride(), *gradients), (dqkv, dtemperature)


def _linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stats: Tensor,
    query_mask: Tensor | None,
    token_mask: Tensor | None,
    spec: Spec,
) -> tuple[Any, ...]:
    """The arguments that forward and backward have in common."""
    of_q, of_k = spec.feature_maps
    return (
        q.shape, v.shape, _DTYPES[q.dtype], FEATURE_MAPS[of_q], FEATURE_MAPS[of_k], spec.normalize, spec.scale,
        spec.eps, q.data_ptr(), q.stride(), k.data_ptr(), k.stride(), v.data_ptr(), v.stride(), *_mask(query_mask),
        *_mask(token_mask), stats.data_ptr(),
    )  # fmt: skip


def linear_attention_forward(
    results: Results, q: Tensor, k: Tensor, v: Tensor, query_mask: Tensor | None, token_mask: Tensor | None, spec: Spec
) -> tuple[tuple[Any, ...], tuple[Tensor, Tensor]]:
    B, H, _, D = q.shape
    Dv = v.shape[-1]
    out = results.output(q, k, v)
    stats = results.empty((B, H, spec.statistics(D, Dv)), accumulate_dtype(q.dtype))
    shared = _linear_attention(q, k, v, stats, query_mask, token_mask, spec)
    return (*shared, out.data_ptr(), _heads_first(out), *(0, _NO_STRIDES) * 4), (out, stats)


def linear_attention_backward(
    results: Results,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stats: Tensor,
    query_mask: Tensor | None,
    token_mask: Tensor | None,
    spec: Spec,
    packed: bool = False,
) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    if packed:
        whole = empty_packed(results.empty, q, k)
        gradients = tuple(whole.select(0, i) for i in range(3))  # views that may be modified in place
    else:
        gradients = tuple(empty_gradient(results.empty, x) for x in (q, k, v))
    shared = _linear_attention(q, k, v, stats, query_mask, token_mask, spec)
    addresses = (address for x in gradients for address in (x.data_ptr(), x.stride()))
    return (*shared, 0, _NO_STRIDES, dout.data_ptr(), dout.stride(), *addresses), gradients
