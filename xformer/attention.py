"""Attention variants by name: the half block ``x + drop_path(attention(norm(x)))`` on tokens (B, N, C).

xfa                XFA with default options: feature map of queries and keys, norms over tokens, softmax
xfa_identity       xfa without softmax
xfa_feature_norm   xfa with norms over the features of each token
xfa_key_value      our interpretation of XFormer's abstract: feature map of keys and values, no softmax
softmax            scaled dot product attention over tokens, quadratic in their number: the expensive baseline
none               no attention: only the convolutions and MLPs remain
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from xformer.layers import DropPath
from xformer_kernels import XFABlock
from xformer_kernels.modules import runs_forward_of
from xformer_kernels.nn import half_block

Factory = Callable[..., nn.Module]
"""Called as (dim, num_heads, attn_drop=, proj_drop=, drop_path=); returns a half block."""


class XFAHalf(XFABlock):
    """:class:`xformer_kernels.XFABlock` with drop path. Takes the same arguments and ``drop_path``."""

    def __init__(self, dim: int, num_heads: int, *, drop_path: float = 0.0, **choices: Any) -> None:
        super().__init__(dim, num_heads, **choices)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, token_mask: Tensor | None = None, group: Any = None) -> Tensor:
        drop_path = self.drop_path
        drops = not runs_forward_of(drop_path, DropPath) or (drop_path.training and drop_path.drop_prob > 0)
        return half_block(x, self.norm, self.attn, self.layer_scale, drop_path if drops else None, token_mask, group)


class SoftmaxHalf(nn.Module):
    """Half block with softmax attention over tokens, using ``scaled_dot_product_attention``."""

    def __init__(
        self, dim: int, num_heads: int, *, attn_drop: float = 0.0, proj_drop: float = 0.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        return x + self.drop_path(self.proj_drop(self.proj(out.transpose(1, 2).flatten(2))))


def _none(dim: int, num_heads: int, **_: Any) -> nn.Module:
    return nn.Identity()


ATTENTION: dict[str, Factory] = {
    "xfa": XFAHalf,
    "xfa_identity": partial(XFAHalf, activation="identity"),
    "xfa_feature_norm": partial(XFAHalf, norm="feature"),
    "xfa_key_value": partial(XFAHalf, map="key_value"),
    "softmax": SoftmaxHalf,
    "none": _none,
}
"""Factories of half blocks by name."""


def factory(attention: str | Factory) -> Factory:
    """Return the factory for a name in :data:`ATTENTION`; a callable is returned unchanged.

    Raises:
        ValueError: unknown name.
    """
    if callable(attention):
        return attention
    if not isinstance(attention, str) or attention not in ATTENTION:
        names = ", ".join(map(repr, ATTENTION))
        raise ValueError(f"attention must be one of {names}, or a factory of half blocks, got {attention!r}")
    return ATTENTION[attention]
