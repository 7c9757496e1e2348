"""The C x C algebra between the two passes over x, and its derivative: small matrices, in eager PyTorch.

The tokens u (B, N, C) are those of x, layer-normalised if requested, minus a vector c per image that is near their
mean. q, k and v are linear in u, ``q = W_q u + c_q`` with ``c_q = b_q + W_q c``, so the Gram matrix and the norms of q
and k follow from ``S = sum_n u u^T``, ``s = sum_n u`` and the number of tokens n::

    q^T k = W_q S W_k^T + (W_q s) c_k^T + c_q (W_k s + n c_k)^T         |q_i|^2 = its diagonal with W_q for W_k as well
    y = M u + m,   M = W_o E W_z,   m = W_o E c_z + b_o                 E: block-diagonal, the maps of all heads

For ``map="query_key"``, E is A and z is v; for ``"key_value"``, E is A^T with q's norms and z is q. c is subtracted
because S would otherwise lose precision if the mean of the tokens is large compared with their spread.

Products over the C features are computed in the accumulate dtype, and never in tf32 if norms are computed from them.
The cosines and all gradients of D x D matrices are computed in float64: if the projections cancel x's dominant
components, they are small differences of large numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xformer_kernels.backends import uncut

QUERY, KEY, VALUE = range(3)


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


def _shifted(w: Weights, c: Tensor) -> Tensor:
    """c_q, c_k and c_v: (B, 3, H, D)."""
    return w.qkv_bias + _apply(w.qkv, c)


def _apply(weight: Tensor, x: Tensor) -> Tensor:
    """(r, H, D, C) to (B, C): (B, r, H, D)."""
    return (uncut(x) @ uncut(weight.flatten(0, 2)).T).to(x.dtype).unflatten(1, weight.shape[:3])


def _inverse(norms: Tensor, rule: Rule) -> Tensor:
    return 1 / norms.clamp_min(rule.eps) if rule.normalised else norms


def _map(cos: Tensor, w: Weights, keep: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """A before and after dropout."""
    A = cos * w.temperature.view(-1, 1, 1)
    if rule.map == "query_key" and rule.activation == "softmax":
        A = A.softmax(-1)
    return A, A if keep is None else A * keep


def _mixing(A: Tensor, inverse: Tensor, rule: Rule) -> Tensor:
    """E (B, H, D, D), whose rows are features of the output."""
    return A if rule.map == "query_key" else (A * inverse[:, QUERY].unsqueeze(-1)).transpose(-2, -1)


def forward(sums: Sums, w: Weights, keep: Tensor | None, rule: Rule) -> tuple[Tensor, Statistics]:
    """m (B, O) of ``y = M u + m``, and the statistics, which include M."""
    rows, (left, right) = w.qkv[: rule.rows], rule.pair
    c = _shifted(w, sums.c)
    s = _apply(rows, sums.s)
    rows = uncut(rows)
    P = (rows.flatten(0, 2) @ uncut(sums.S)).unflatten(1, rows.shape[:3])  # (B, r, H, D, C)
    c64, s64, n64 = c.double(), s.double(), sums.n.double().view(-1, 1, 1)
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
    cos, inverse, norms = (t.to(c.dtype) for t in (cos, inverse, norms))
    E = _mixing(_map(cos, w, keep, rule)[1], inverse, rule)
    M = w.proj @ (E @ w.qkv[rule.mixed]).flatten(1, 2)
    m = (E @ c[:, rule.mixed].unsqueeze(-1)).flatten(1) @ w.proj.T + w.proj_bias
    return m, Statistics(M, cos, norms)


def backward(
    dM: Tensor, dm: Tensor, sums: Sums, w: Weights, keep: Tensor | None, rule: Rule, statistics: Statistics
) -> tuple[Tensor, Tensor, Gradients]:
    """R (B, C, C) and r (B, C) of the gradient with respect to u, M^T dy + R u + r; and the gradients of the weights.

    dM = sum_n dy u^T (B, O, C) and dm = sum_n dy (B, O).
    """
    (left, right), mixed = rule.pair, rule.mixed
    cos, norms = statistics.cos.double(), statistics.norms.double()
    c, inverse = _shifted(w, sums.c), _inverse(norms, rule)
    A, kept = _map(cos, w, keep, rule)
    E, z = _mixing(kept, inverse, rule).to(c.dtype), w.qkv[mixed]
    heads = z.shape[:2]

    T, e = (E @ z).flatten(1, 2), (E @ c[:, mixed].unsqueeze(-1)).flatten(1)
    dproj = (dM @ T.transpose(-2, -1)).sum(0) + dm.T @ e
    dT, de = (w.proj.T @ dM).unflatten(1, heads), (dm @ w.proj).unflatten(1, heads)
    dE = (dT @ z.transpose(-2, -1)).double() + de.double().unsqueeze(-1) * c[:, mixed].double().unsqueeze(-2)
    dz = (E.transpose(-2, -1) @ dT).sum(0)
    dshifted = torch.zeros_like(c)
    dshifted[:, mixed] = (E.transpose(-2, -1) @ de.unsqueeze(-1)).squeeze(-1)

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
    dtemperature = (dA * cos).sum((0, 2, 3))
    dcos = dA * w.temperature.view(-1, 1, 1)
    dnorms = dcos * cos
    dsquares[left] = dsquares[left] - dnorms.sum(-1) * inverse[:, left].square() / 2
    dG = dcos * inverse[:, left].unsqueeze(-1)
    if right == KEY:
        dsquares[KEY] = dsquares[KEY] - dnorms.sum(-2) * inverse[:, KEY].square() / 2
        dG = dG * inverse[:, KEY].unsqueeze(-2)
    clamped = norms <= rule.eps if rule.normalised else torch.ones_like(norms, dtype=torch.bool)
    dG = dG.to(c.dtype)

    # Gradients of G = [W_q c_q] [S s; s^T n] [W_k c_k]^T and of the norms, times the right factor: X and x
    rows = w.qkv[: rule.rows]
    parts: list[tuple[Tensor, Tensor]] = []
    for i in range(rule.rows):
        terms, shifts = [], []
        if i < VALUE:
            scale = 2 * torch.where(clamped[:, i], 0, dsquares[i]).to(c.dtype)
            terms.append(scale.unsqueeze(-1) * rows[i])
            shifts.append(scale * c[:, i])
        for one, other, d in ((left, right, dG), (right, left, dG.transpose(-2, -1))):
            if i == one:
                terms.append(d @ rows[other])
                shifts.append((d @ c[:, other].unsqueeze(-1)).squeeze(-1))
        parts.append((sum(terms[1:], terms[0]), sum(shifts[1:], shifts[0])))
    X = torch.stack([part for part, _ in parts], 1).flatten(1, 3)  # (B, r H D, C)
    x = torch.stack([part for _, part in parts], 1)  # (B, r, H, D)
    R = rows.flatten(0, 2).T @ X
    r = x.flatten(1) @ rows.flatten(0, 2)

    dshifted[:, : rule.rows] += (X @ sums.s.unsqueeze(-1)).view_as(x) + sums.n.view(-1, 1, 1, 1) * x
    dqkv = dshifted.flatten(1).T @ sums.c
    dqkv[: X.shape[1]] += (X @ sums.S).sum(0) + x.flatten(1).T @ sums.s
    dqkv = dqkv.view_as(w.qkv)
    dqkv[mixed] += dz
    return R, r, Gradients(dqkv, dshifted.sum(0), dtemperature, dproj, dm.sum(0))
