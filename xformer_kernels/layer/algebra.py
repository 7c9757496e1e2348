"""The C x C algebra between the two passes over x, and its derivative: products over all heads, in eager PyTorch.

The tokens u (B, N, C) are those of x, layer-normalised if requested, minus a vector c per image that is near their
mean. q, k and v are linear in u, ``q = W_q u + c_q`` with ``c_q = b_q + W_q c``, so the Gram matrix and the norms of q
and k follow from ``S = sum_n u u^T``, ``s = sum_n u`` and the number of tokens n::

    q^T k = W_q S W_k^T + (W_q s) c_k^T + c_q (W_k s + n c_k)^T         |q_i|^2 = its diagonal with W_q for W_k as well
    y = M u + m,   M = W_o E W_z,   m = W_o E c_z + b_o                 E: block-diagonal, the maps of all heads

For ``map="query_key"``, E is A and z is v; for ``"key_value"``, E is A^T with q's norms and z is q. c is subtracted
because S would otherwise lose precision if the mean of the tokens is large compared with their spread.

What is computed for each head by itself, the maps, is in maps.py. Products over the C features are computed in the
accumulate dtype, and never in tf32 if norms are computed from them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from xformer_kernels.backends import uncut
from xformer_kernels.layer.maps import MapGradients, Maps, Rule


class Weights(NamedTuple):
    """A layer's weights in the accumulate dtype, with layer norm's weight and bias and the layer scale folded in."""

    qkv: Tensor  # (3, H, D, C)
    qkv_bias: Tensor  # (3, H, D)
    temperature: Tensor  # (H,)
    proj: Tensor  # (O, H D)
    proj_bias: Tensor  # (O,)


class Sums(NamedTuple):
    """The results of the first pass."""

    S: Tensor  # (B, C, C)
    s: Tensor  # (B, C)
    n: Tensor  # (B, 1), in the dtype of the others
    c: Tensor  # (B, C)


class Statistics(NamedTuple):
    """What is saved for backward."""

    M: Tensor  # (B, O, C)
    cos: Tensor  # (B, H, D, D)
    norms: Tensor  # (B, 2, H, D) of q and k


class Gradients(NamedTuple):
    qkv: Tensor
    qkv_bias: Tensor
    temperature: Tensor
    proj: Tensor
    proj_bias: Tensor


def forward(
    sums: Sums, w: Weights, keep: Tensor | None, rule: Rule, maps: Callable[..., Maps]
) -> tuple[Tensor, Statistics]:
    """m (B, O) of ``y = M u + m``, and the statistics, which include M. `maps`: as :func:`maps.layer_maps`."""
    rows = w.qkv[: rule.rows]
    P = (uncut(rows.flatten(0, 2)) @ uncut(sums.S)).unflatten(1, rows.shape[:3])
    T, e, cos, norms = maps(P, w.qkv, w.qkv_bias, w.temperature, sums.s, sums.n, sums.c, keep, rule)
    m = torch.addmm(w.proj_bias, e.flatten(1), w.proj.T)
    return m, Statistics(w.proj @ T.flatten(1, 2), cos, norms)


def backward(
    dM: Tensor,
    dm: Tensor,
    sums: Sums,
    w: Weights,
    keep: Tensor | None,
    rule: Rule,
    statistics: Statistics,
    maps_backward: Callable[..., MapGradients],
) -> tuple[Tensor, Tensor, Gradients]:
    """R (B, C, C) and r (B, C) of the gradient with respect to u, M^T dy + R u + r; and the gradients of the weights.

    dM = sum_n dy u^T (B, O, C) and dm = sum_n dy (B, O). `maps_backward`: as :func:`maps.layer_maps_backward`.
    """
    S, s, n, c = sums
    heads = w.qkv.shape[1:3]
    dT, de = (w.proj.T @ dM).unflatten(1, heads), (dm @ w.proj).unflatten(1, heads)
    X, x, T, e, dz, dshifted, dtemperature = maps_backward(
        dT, de, w.qkv, w.qkv_bias, w.temperature, statistics.cos, statistics.norms, s, n, c, keep, rule
    )
    dproj = torch.addmm((dM @ T.flatten(1, 2).transpose(-2, -1)).sum(0), dm.T, e.flatten(1))

    rows, X, x = w.qkv[: rule.rows].flatten(0, 2), X.flatten(1, 3), x.flatten(1)
    R, r = rows.T @ X, x @ rows
    dqkv = dshifted.flatten(1).T @ c
    dqkv[: X.shape[1]] += torch.addmm((X @ S).sum(0), x.T, s)
    dqkv = dqkv.view_as(w.qkv)
    dqkv[rule.mixed] += dz.sum(0)
    return R, r, Gradients(dqkv, dshifted.sum(0), dtemperature.sum(0), dproj, dm.sum(0))
