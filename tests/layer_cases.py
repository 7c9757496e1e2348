"""Layers and half blocks with their inputs, for the tests of both forms."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from cases import Config, randn, random_mask
from torch import Tensor

import xformer_kernels as xk
from xformer_kernels import reference
from xformer_kernels.testing import assert_close, gradient_terms

NAMES = (
    "x", "qkv_weight", "qkv_bias", "temperature", "proj_weight", "proj_bias", "ln_weight", "ln_bias", "layer_scale",
)  # fmt: skip
# (B, N, C, heads)
LAYER_SHAPES = (
    (1, 1, 1, 1),
    (2, 3, 6, 3),
    (3, 70, 20, 4),
    (1, 613, 31, 1),
    (2, 130, 66, 3),
    (1, 150, 130, 2),
    (2, 40, 96, 8),
    (1, 3000, 24, 2),
)


@dataclass
class Layer:
    """Inputs of one call of xfa_block (xfa_layer if there is no layer norm) and of its backward."""

    tensors: tuple[Tensor | None, ...]  # in the order of NAMES
    dy: Tensor
    config: Config = field(default_factory=Config)
    token_mask: Tensor | None = None
    ln_eps: float | None = None

    @property
    def names(self) -> list[str]:
        return [name for name, t in zip(NAMES, self.tensors, strict=True) if t is not None]

    def to(self, dtype: torch.dtype) -> Layer:
        tensors = tuple(None if t is None else t.to(dtype) for t in self.tensors)
        return replace(self, tensors=tensors, dy=self.dy.to(dtype))

    def leaves(self) -> list[Any]:
        return [None if t is None else t.detach().requires_grad_() for t in self.tensors]

    def call(self, leaves: list[Any], **choices: Any) -> Tensor:
        x, qkv_weight, qkv_bias, temperature, proj_weight, proj_bias, ln_weight, ln_bias, layer_scale = leaves
        weights = (qkv_weight, qkv_bias, temperature, proj_weight, proj_bias)
        choices = {**self.config.kwargs(), "token_mask": self.token_mask, **choices}
        if self.ln_eps is None:
            return xk.xfa_layer(x, *weights, **choices)
        return xk.xfa_block(x, ln_weight, ln_bias, self.ln_eps, *weights, layer_scale=layer_scale, **choices)

    def by_reference(self, leaves: list[Any]) -> Tensor:
        return reference.xfa_block(
            *leaves,
            ln_eps=self.ln_eps,
            residual=self.ln_eps is not None,
            token_mask=self.token_mask,
            **self.config.kwargs(),
        )

    def _gradients(self, function: Any) -> dict[str, Tensor]:
        leaves = self.leaves()
        y = function(leaves)
        grads = torch.autograd.grad(y, [t for t in leaves if t is not None], self.dy.to(y.dtype))
        return {"y": y.detach(), **{f"d{name}": g for name, g in zip(self.names, grads, strict=True)}}

    def run(self, **choices: Any) -> dict[str, Tensor]:
        """The output and all gradients, by name."""
        return self._gradients(lambda leaves: self.call(leaves, **choices))

    def eager(self) -> dict[str, Tensor]:
        return self._gradients(self.by_reference)

    def oracle(self) -> dict[str, Tensor]:
        return self.to(torch.float64)._gradients(self.by_reference)

    def terms(self) -> dict[str, Tensor]:
        """The terms of subtractions in the gradients, as :func:`gradient_terms` for xfa."""
        exact = self.to(torch.float64)
        x, weight, bias, temperature, proj, _, ln_weight, ln_bias, scale = exact.tensors
        u = x if self.ln_eps is None else F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, self.ln_eps)
        dout = (exact.dy if scale is None else exact.dy * scale) @ proj
        heads = temperature.numel()
        q, k, v, dout = (
            t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (*F.linear(u, weight, bias).chunk(3, -1), dout)
        )
        of_tokens = gradient_terms(q, k, v, temperature, dout, token_mask=self.token_mask, **self.config.kwargs())
        if self.token_mask is not None:
            u = torch.where(self.token_mask[..., None], u, 0)
        dq, dk = (of_tokens[name].transpose(1, 2).flatten(2) for name in ("dq", "dk"))
        dqk = torch.cat((dq, dk), 2).flatten(0, 1)
        dx = du = (dqk @ weight[: dqk.shape[1]]).view_as(x)
        of_norm = {}
        if self.ln_eps is not None:
            spread = (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
            dx = (du if ln_weight is None else du * ln_weight) / (spread + self.ln_eps).sqrt()
            normed = F.layer_norm(x, x.shape[-1:], eps=self.ln_eps)
            of_norm = {"dln_weight": (du * normed).sum((0, 1)), "dln_bias": du.sum((0, 1))}
        return {
            **of_norm,
            "dx": dx,
            "dqkv_weight": dqk.T @ u.flatten(0, 1),
            "dqkv_bias": dqk.sum(0),
            "dtemperature": of_tokens["dtemperature"],
        }

    def check(self, result: dict[str, Tensor], names: tuple[str, ...] = ()) -> None:
        """Checks the output and all gradients with :func:`assert_close`."""
        eager, oracle, terms = self.eager(), self.oracle(), self.terms()
        for name in names or oracle:
            assert result[name].dtype == eager[name].dtype, f"{name} is {result[name].dtype}"
            assert_close(result[name], eager[name], oracle[name], name, terms.get(name))


def make_layer(
    shape: tuple[int, int, int, int],
    config: Config | None = None,
    *,
    block: bool = False,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    masked: bool = False,
    bias: bool = True,
    mean: float = 0.0,
    out: int | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Layer:
    """A layer whose channels have different means and spreads; `mean`: scale of additional means, in spreads."""
    B, N, C, heads = shape
    inner = C if C % heads == 0 else heads * (C // heads + 1)
    O = out or C  # noqa: E741
    base = 100 * seed

    def random(i: int, *size: int, to: torch.dtype | None = None) -> Tensor:
        return randn(*size, seed=base + i, dtype=torch.float64).to(device, to or weight_dtype or dtype)

    spread = torch.linspace(0.5, 2.0, C, dtype=torch.float64)
    x = randn(B, N, C, seed=base, dtype=torch.float64) * spread
    x = (x + (0.1 + mean) * spread * randn(C, seed=base + 1, dtype=torch.float64)).to(device, dtype)
    weights = (
        random(2, 3 * inner, C) / C**0.5,
        random(3, 3 * inner) / 2 if bias else None,
        torch.linspace(0.7, 3.0, heads, dtype=torch.float64).to(device, weight_dtype or dtype),
        random(4, O, inner) / inner**0.5,
        random(5, O) if bias else None,
    )
    norm = (1 + random(6, C) / 4, random(7, C) / 2, random(8, O)) if block else (None, None, None)
    mask = random_mask(B, N, seed, device) if masked else None
    dy = random(9, B, N, O, to=dtype)
    return Layer((x, *weights, *norm), dy, config or Config(), mask, 1e-5 if block else None)
