"""The drop-in layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xformer_kernels import dispatch, validate
from xformer_kernels.functional import xfa


class XFA(nn.Module):
    """Cross feature attention with its projections: (B, N, C) to (B, N, C), see :func:`xformer_kernels.xfa`.

    ::

        q, k, v = split(qkv(x));  y = proj_drop(proj(xfa(q, k, v, temperature)))

    A drop-in for timm's ``XCA``: same constructor, same state dict (``temperature``, ``qkv.weight``[, ``qkv.bias``],
    ``proj.weight``, ``proj.bias``), same numbers.

    Args:
        dim: features C of a token, a multiple of ``num_heads``.
        num_heads: heads H; each has C / H features and a temperature of its own.
        qkv_bias: whether the projection to q, k, v has a bias.
        attn_drop: dropout on the map, in training.
        proj_drop: dropout on the result, in training.
        map, norm, activation, backend: as in :func:`xformer_kernels.xfa`.

    Raises:
        TypeError, ValueError: at construction for a bad argument; in ``forward`` for an x that is not (B, N, C).
    """

    # As class attributes too: integrations turn modules with XCA's parameters into this class.
    map: str = "query_key"
    norm: str = "token"
    activation: str = "softmax"
    backend: str = "auto"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        map: str = "query_key",
        norm: str = "token",
        activation: str = "softmax",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if dim <= 0 or num_heads <= 0 or dim % num_heads:
            raise ValueError(
                f"dim must be a positive multiple of num_heads (positive too), got dim={dim}, num_heads={num_heads}"
            )
        validate.choice("map", map, validate.MAPS)
        validate.choice("norm", norm, validate.NORMS)
        validate.choice("activation", activation, validate.ACTIVATIONS)
        validate.probability("attn_drop", attn_drop)
        validate.probability("proj_drop", proj_drop)
        dispatch.check_name(backend)
        self.num_heads = num_heads
        self.map, self.norm, self.activation, self.backend = map, norm, activation, backend
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """x (B, N, C) to (B, N, C); token_mask (B, N) bool, False tokens take no part in the attention."""
        validate.tensor("x", x)
        if x.dim() != 3 or x.shape[-1] != self.qkv.in_features:
            raise ValueError(f"x must have shape (B, N, C) with C = {self.qkv.in_features}, got {tuple(x.shape)}")
        B, N, C = x.shape
        # split along dim 2: autograd then joins dq, dk and dv into the projection's gradient with one copy
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, C // self.num_heads).unbind(2)
        out = xfa(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            self.temperature,
            map=self.map,
            norm=self.norm,
            activation=self.activation,
            token_mask=token_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            backend=self.backend,
        )
        y: Tensor = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        return y

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimiser should not decay (timm's convention)."""
        return {"temperature"}

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, map={self.map!r}, norm={self.norm!r}, "
            f"activation={self.activation!r}, backend={self.backend!r}"
        )
