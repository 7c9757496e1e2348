"""What linear attention needs beside ``gram`` and ``channel_mix``: a Gram matrix with a sum, and a quotient.

    gram_and_sum  -> (G, sum_a)      G[i,j] = sum_n a[n,i] b[n,j], sum_a[i] = sum_n a[n,i]

Tokens, backends and what is eager are as in :mod:`xformer_kernels.ops`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xformer_kernels import backends, dispatch, ops, reference

ops.library.define("gram_and_sum(Tensor a, Tensor b, str backend) -> (Tensor G, Tensor sum_a)")


def gram_and_sum(a: Tensor, b: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """G (B, H, Da, Db) and sum_a (B, H, Da) in the accumulate dtype."""
    result: tuple[Tensor, Tensor] = ops.call("gram_and_sum", backend, (a, b))
    return result


class _GramAndSum(torch.autograd.Function):
    """da = b dG^T + dsum_a and db = a dG, each one channel_mix: differentiable to any order."""

    @staticmethod
    def forward(ctx: Any, backend: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, b)
        ctx.backend = backend
        result: tuple[Tensor, Tensor] = ops.below_autograd("gram_and_sum", backend, a, b)(a, b)
        return result

    @staticmethod
    def backward(ctx: Any, dG: Tensor, dsum_a: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        _, a_wanted, b_wanted = ctx.needs_input_grad
        da = ops.channel_mix(ctx.backend, b, dG, dsum_a) if a_wanted else None
        db = ops.channel_mix(ctx.backend, a, dG.transpose(-2, -1)) if b_wanted else None
        return None, da, db


def _compute(backend: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    found, _ = backends.load(backend)
    if found is not None and found.function("layer_gram") is not None:
        G, sum_a, _ = dispatch.kernel(backend, "layer_gram")(a, b, False, None, None, None)
    else:
        G, _, _ = dispatch.kernel(backend, "gram")(a, b, False, None)
        sum_a = reference.column_sums(a, None)
    return G, sum_a


def _fake(a: Tensor, b: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    G, sum_a, _ = ops._fake_gram(a, b)
    return G, sum_a


ops.register("gram_and_sum", _fake, _GramAndSum, ("a", "b"), _compute)


def quotient(x: Tensor) -> Tensor:
    """All features of (B, H, N, D + 1) tokens but the last, divided by the last: (B, H, N, D), token-major."""
    y: Tensor = _Quotient.apply(x.transpose(1, 2))
    return y.transpose(1, 2)


class _Quotient(torch.autograd.Function):
    """Its gradient is one tensor, written once: autograd's of two slices would be the sum of two padded ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x[..., :-1] / x[..., -1:]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        numerator, denominator = x[..., :-1], x[..., -1:]
        if torch.is_grad_enabled() or not ops.plain(x, dy):
            first = dy / denominator
            return torch.cat((first, -(first * numerator).sum(-1, keepdim=True) / denominator), -1)
        dx = torch.empty_like(x)
        first, last = dx[..., :-1], dx[..., -1:]
        torch.div(dy, denominator, out=first)
        torch.addcdiv(x.new_zeros(()), (first * numerator).sum(-1, keepdim=True), denominator, value=-1, out=last)
        return dx
