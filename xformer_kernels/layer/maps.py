"""The maps of a layer in Gram form and their derivatives, head by head, in eager PyTorch.

The formulas are those of algebra.py. A backend may implement both functions: here they are dozens of small operators,
which take longer to call than to compute. The cosines and all gradients of D x D matrices are computed in float64: if
the projections cancel x's dominant components, they are small differences of large numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xformer_kernels.backends import uncut

QUERY, KEY, VALUE = range(3)


class Rule(NamedTuple):
    map: str
    activation: str
    eps: float
    normalised: bool = True  # otherwise all norms are 1

    @property
    def pair(self) -> tuple[int, int]:
        """The two of q, k, v whose Gram matrix is the map."""
        return (QUERY, KEY) if self.map == "query_key" else (KEY, VALUE)

    @property
    def mixed(self) -> int:
        """The one of q, k, v that the map is applied to."""
        return VALUE if self.map == "query_key" else QUERY

    @property
    def rows(self) -> int:
        """How many of q, k, v, in this order, the Gram matrix and the norms need."""
        return max(KEY, *self.pair) + 1


class Maps(NamedTuple):
    T: Tensor  # (B, H, D, C): E W_z
    e: Tensor  # (B, H, D): E c_z
    cos: Tensor  # (B, H, D, D)
    norms: Tensor  # (B, 2, H, D) of q and k


class MapGradients(NamedTuple):
    """The gradient with respect to [W c] through G and the norms is [X x] [S s; s^T n]."""

    X: Tensor  # (B, r, H, D, C), r the rule's `rows`
    x: Tensor  # (B, r, H, D)
    T: Tensor  # (B, H, D, C), as in Maps
    e: Tensor  # (B, H, D)
    dz: Tensor  # (B, H, D, C): gradient with respect to W_z through T
    dshifted: Tensor  # (B, 3, H, D): gradients with respect to c_q, c_k and c_v
    dtemperature: Tensor  # (B, H), in float64


def _apply(weight: Tensor, x: Tensor) -> Tensor:
    """(r, H, D, C) to (B, C): (B, r, H, D)."""
    return (uncut(x) @ uncut(weight.flatten(0, 2)).T).to(x.dtype).unflatten(1, weight.shape[:3])


def _inverse(norms: Tensor, rule: Rule) -> Tensor:
    return 1 / norms.clamp_min(rule.eps) if rule.normalised else norms


def _map(cos: Tensor, temperature: Tensor, keep: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """A before and after dropout."""
    A = cos * temperature.view(-1, 1, 1)
    if rule.map == "query_key" and rule.activation == "softmax":
        A = A.softmax(-1)
    return A, A if keep is None else A * keep


def _mixing(A: Tensor, inverse: Tensor, rule: Rule) -> Tensor:
    """E (B, H, D, D), whose rows are features of the output."""
    return A if rule.map == "query_key" else (A * inverse[:, QUERY].unsqueeze(-1)).transpose(-2, -1)


def layer_maps(
    P: Tensor, qkv: Tensor, qkv_bias: Tensor, temperature: Tensor, s: Tensor, n: Tensor, c: Tensor,
    keep: Tensor | None, rule: Rule,
) -> Maps:  # fmt: skip
    """The maps of all heads from the Gram matrix of the tokens.

    Args:
        P: (B, r, H, D, C), ``W S`` of the rule's `rows`; it may be wider than the accumulate dtype.
        qkv, qkv_bias, temperature: see :class:`xformer_kernels.layer.algebra.Weights`.
        s, n, c: see :class:`xformer_kernels.layer.algebra.Sums`.
        keep: (B, H, D, D) or None; multiplies the maps.
    """
    left, right = rule.pair
    shifted, rows = qkv_bias + _apply(qkv, c), qkv[: rule.rows]
    s = _apply(rows, s)
    rows = uncut(rows)
    c64, s64, n64 = shifted.double(), s.double(), n.double().view(-1, 1, 1)
    G = (rows[left] @ P[:, right].transpose(-2, -1)).double()
    G = G + s64[:, left].unsqueeze(-1) * c64[:, right].unsqueeze(-2)
    G = G + c64[:, left].unsqueeze(-1) * (s64[:, right] + n64 * c64[:, right]).unsqueeze(-2)
    squares = (rows[:VALUE] * P[:, :VALUE]).sum(-1).double()
    squares = squares + c64[:, :VALUE] * (2 * s64[:, :VALUE] + n64.unsqueeze(-1) * c64[:, :VALUE])
    norms = squares.clamp_min(0).sqrt() if rule.normalised else torch.ones_like(squares)
    inverse = _inverse(norms, rule)
    cos = G * inverse[:, left].unsqueeze(-1)
    if right == KEY:
        cos = cos * inverse[:, KEY].unsqueeze(-2)
    cos, inverse, norms = (t.to(shifted.dtype) for t in (cos, inverse, norms))
    E = _mixing(_map(cos, temperature, keep, rule)[1], inverse, rule)
    e = (E @ shifted[:, rule.mixed].unsqueeze(-1)).squeeze(-1)
    return Maps(E @ qkv[rule.mixed], e, cos, norms)


def layer_maps_backward(
    dT: Tensor, de: Tensor, qkv: Tensor, qkv_bias: Tensor, temperature: Tensor, cos: Tensor, norms: Tensor,
    s: Tensor, n: Tensor, c: Tensor, keep: Tensor | None, rule: Rule,
) -> MapGradients:  # fmt: skip
    """The gradients of :func:`layer_maps` from those of T and e. Arguments as there, and two of its results."""
    (left, right), mixed = rule.pair, rule.mixed
    cos, norms = cos.double(), norms.double()
    shifted, inverse = qkv_bias + _apply(qkv, c), _inverse(norms, rule)
    A, kept = _map(cos, temperature, keep, rule)
    E, z = _mixing(kept, inverse, rule).to(c.dtype), qkv[mixed]
    dE = (dT @ z.transpose(-2, -1)).double() + de.double().unsqueeze(-1) * shifted[:, mixed].double().unsqueeze(-2)

    # dsquares: gradients with respect to |q|^2 and |k|^2, where the norms are not clamped to eps
    dsquares = [torch.zeros_like(norms[:, QUERY]), torch.zeros_like(norms[:, KEY])]
    if rule.map == "query_key":
        dA = dE
    else:
        dA = dE.transpose(-2, -1)
        dsquares[QUERY] = (dA * kept).sum(-1) * inverse[:, QUERY].pow(3) / -2
        dA = dA * inverse[:, QUERY].unsqueeze(-1)
    if keep is not None:
        dA = dA * keep
    if rule.map == "query_key" and rule.activation == "softmax":
        dA = A * (dA - (A * dA).sum(-1, keepdim=True))
    dtemperature = (dA * cos).sum((2, 3))
    dcos = dA * temperature.view(-1, 1, 1)
    dnorms = dcos * cos
    dsquares[left] = dsquares[left] - dnorms.sum(-1) * inverse[:, left].square() / 2
    dG = dcos * inverse[:, left].unsqueeze(-1)
    if right == KEY:
        dsquares[KEY] = dsquares[KEY] - dnorms.sum(-2) * inverse[:, KEY].square() / 2
        dG = dG * inverse[:, KEY].unsqueeze(-2)
    clamped = norms <= rule.eps if rule.normalised else torch.ones_like(norms, dtype=torch.bool)
    dG = dG.to(c.dtype)

    # Gradients of G = [W_q c_q] [S s; s^T n] [W_k c_k]^T and of the norms, times the right factor: X and x
    parts: list[tuple[Tensor, Tensor]] = []
    for i in range(rule.rows):
        terms, shifts = [], []
        if i < VALUE:
            scale = 2 * torch.where(clamped[:, i], 0, dsquares[i]).to(c.dtype)
            terms.append(scale.unsqueeze(-1) * qkv[i])
            shifts.append(scale * shifted[:, i])
        for one, other, d in ((left, right, dG), (right, left, dG.transpose(-2, -1))):
            if i == one:
                terms.append(d @ qkv[other])
                shifts.append((d @ shifted[:, other].unsqueeze(-1)).squeeze(-1))
        parts.append((sum(terms[1:], terms[0]), sum(shifts[1:], shifts[0])))
    X = torch.stack([part for part, _ in parts], 1)
    x = torch.stack([part for _, part in parts], 1)

    dshifted = torch.zeros_like(shifted)
    dshifted[:, mixed] = (E.transpose(-2, -1) @ de.unsqueeze(-1)).squeeze(-1)
    dshifted[:, : rule.rows] += (X.flatten(1, 3) @ s.unsqueeze(-1)).view_as(x) + n.view(-1, 1, 1, 1) * x
    e = (E @ shifted[:, mixed].unsqueeze(-1)).squeeze(-1)
    return MapGradients(X, x, E @ z, e, E.transpose(-2, -1) @ dT, dshifted, dtemperature)
