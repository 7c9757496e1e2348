"""Calls whose tokens are split over ranks: their inputs, and their results on one rank and in one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cases import randn
from torch import Tensor

import xformer_kernels as xk
from xformer_kernels import reference
from xformer_kernels.spec import Spec

LAYER_WEIGHTS = ("qkv_weight", "qkv_bias", "temperature", "proj_weight", "proj_bias")
BLOCK_WEIGHTS = (*LAYER_WEIGHTS, "ln_weight", "ln_bias", "layer_scale")
SEED = 11


@dataclass(frozen=True)
class Case:
    """One call whose tokens are split; `split`: the tokens of each rank, by number of ranks."""

    form: str = "gram"
    map: str = "query_key"
    norm: str = "token"
    activation: str = "softmax"
    dtype: torch.dtype = torch.float32
    weights: torch.dtype | None = None
    masked: bool = False
    dropout_p: float = 0.0
    block: bool = False
    B: int = 2
    C: int = 24
    H: int = 3
    split: tuple[tuple[int, ...], ...] = ((40, 27), (31, 5, 31))
    only: int = 0

    @property
    def choices(self) -> dict[str, Any]:
        return {"map": self.map, "norm": self.norm, "activation": self.activation}

    def shards(self, ranks: int) -> tuple[int, ...]:
        return self.split[ranks - 2]

    def __str__(self) -> str:
        parts = [self.form, self.map, self.norm, self.activation, str(self.dtype).removeprefix("torch.")]
        parts += ["masked"] * self.masked + ["dropout"] * bool(self.dropout_p) + ["block"] * self.block
        parts += ["empty"] * (0 in self.split[0]) + ["narrow"] * (self.weights == self.dtype) + [f"C{self.C}"]
        return "-".join(parts)

    def inputs(self) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor | None]:
        """x, dout, weights by name, and mask, for all tokens; the same on every rank."""
        N, C = sum(self.split[0]), self.C
        dtype = self.weights or reference.accumulate_dtype(self.dtype)
        spread = torch.linspace(0.5, 1.5, C, dtype=torch.float64)
        x = (randn(self.B, N, C, seed=1, dtype=torch.float64) * spread + spread.flip(0)).to(self.dtype)
        weights = {
            "qkv_weight": randn(3 * C, C, seed=2, dtype=torch.float64) * C**-0.5,
            "qkv_bias": randn(3 * C, seed=3, dtype=torch.float64) * 0.3,
            "temperature": torch.linspace(0.7, 2.0, self.H, dtype=torch.float64),
            "proj_weight": randn(C, C, seed=4, dtype=torch.float64) * C**-0.5,
            "proj_bias": randn(C, seed=5, dtype=torch.float64),
        }
        if self.block:
            weights["ln_weight"] = spread
            weights["ln_bias"] = randn(C, seed=6, dtype=torch.float64) * 0.2
            weights["layer_scale"] = spread.flip(0)
        mask = torch.rand(self.B, N, generator=torch.Generator().manual_seed(7)) < 0.7 if self.masked else None
        dout = randn(self.B, N, C, seed=8, dtype=torch.float64).to(self.dtype)
        return x, dout, {name: t.to(dtype) for name, t in weights.items()}, mask

    def run(self, group: Any, rank: int, ranks: int) -> dict[str, Tensor]:
        """The output, gradient of the tokens and gradients of the weights of this rank."""
        sizes = self.shards(ranks)
        x, dout, weights, mask = self.inputs()
        x, dout = (t.split(sizes, 1)[rank].clone() for t in (x, dout))
        mask = None if mask is None else mask.split(sizes, 1)[rank]
        x.requires_grad_()
        leaves = {name: t.requires_grad_() for name, t in weights.items()}
        torch.manual_seed(SEED + rank)
        out = self.call(x, leaves, token_mask=mask, group=group)
        grads = torch.autograd.grad(out, (x, *leaves.values()), dout)
        return {"out": out.detach(), **dict(zip(("dx", *leaves), grads, strict=True))}

    def call(self, x: Tensor, w: dict[str, Tensor], **kwargs: Any) -> Tensor:
        layer = [w[name] for name in LAYER_WEIGHTS]
        choices = {**self.choices, "form": self.form, "dropout_p": self.dropout_p, **kwargs}
        if self.block:
            return xk.xfa_block(
                x, w["ln_weight"], w["ln_bias"], 1e-6, *layer, layer_scale=w["layer_scale"], **choices
            )  # fmt: skip
        return xk.xfa_layer(x, *layer, **choices)

    def by_reference(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The same results from one process; all in `dtype`, or in the dtypes of the case if None."""
        x, dout, weights, mask = self.inputs()
        x, dout = (t.to(dtype or t.dtype).requires_grad_(t is x) for t in (x, dout))
        leaves = {name: t.to(dtype or t.dtype).requires_grad_() for name, t in weights.items()}
        cast = {name: t.to(x.dtype) for name, t in leaves.items()}
        choices = dict(self.choices, token_mask=mask)
        if self.dropout_p:
            torch.manual_seed(SEED)
            D = self.C // self.H
            wide = reference.accumulate_dtype(self.dtype)
            keep = F.dropout(torch.ones(self.B, self.H, D, D, dtype=wide), self.dropout_p)
            choices["map_fn"] = lambda S: reference.activate(S, Spec(self.map, self.norm, self.activation)) * keep
        function = reference.xfa_block if self.block else reference.xfa_layer
        out = function(x, *cast.values(), **choices)
        grads = torch.autograd.grad(out, (x, *leaves.values()), dout)
        return {"out": out.detach(), **dict(zip(("dx", *leaves), grads, strict=True))}


EMPTY = ((0, 67), (33, 0, 34))
CASES = (
    *(
        Case(form, map, "token", activation)
        for form in ("gram", "direct")
        for map, activation in (("query_key", "softmax"), ("query_key", "identity"), ("key_value", "softmax"))
    ),
    Case("direct", norm="feature"),
    Case("direct", "key_value", norm="feature", masked=True),
    Case("direct", norm="feature", masked=True, dtype=torch.float16, dropout_p=0.2),
    *(Case(form, masked=True, block=True, split=EMPTY) for form in ("gram", "direct")),
    *(Case(form, "key_value", block=True, split=EMPTY) for form in ("gram", "direct")),
    *(Case(form, dropout_p=0.3, block=block) for form, block in (("gram", True), ("direct", False))),
    *(Case(form, dtype=torch.float64, masked=True, block=True) for form in ("gram", "direct")),
    *(Case(form, dtype=torch.bfloat16, block=True) for form in ("gram", "direct")),
    *(Case(form, dtype=torch.bfloat16, weights=torch.bfloat16, split=EMPTY) for form in ("gram", "direct")),
    # the ranks alone would choose different forms
    Case("auto", B=1, C=64, H=2, split=((3, 4000), (3, 4000, 0))),
)
