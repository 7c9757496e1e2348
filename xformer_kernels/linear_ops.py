"""The ops of linear attention, and ``gram_and_sum``, used with ``channel_mix`` if a backend has no fused kernel.

    linear_attention_forward   -> (out, stats)      out (B, N, H, Dv) as in xfa_forward; stats: read by the same
                                                    backend's backward
    linear_attention_backward  -> (dq, dk, dv)      (B, H, N, D), (B, H, M, D), (B, H, M, Dv): each in (B, N, H, D)
                                                    memory, or in (B, H, D, N) memory if its input is channel-major;
                                                    with ``packed``, views of one buffer, as in xfa_backward
    gram_and_sum               -> (G, sum_a)        G[i,j] = sum_n a[n,i] b[n,j], sum_a[i] = sum_n a[n,i]

Tokens, backends and eager calls are as in :mod:`xformer_kernels.ops`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from xformer_kernels import dispatch, ops, reference
from xformer_kernels.backends import layouts
from xformer_kernels.spec import Spec

_INPUTS = "Tensor q, Tensor k, Tensor v"
_CHOICES = "Tensor? query_mask, Tensor? token_mask, str spec, str backend"
ops.library.define(f"linear_attention_forward({_INPUTS}, {_CHOICES}) -> (Tensor out, Tensor stats)")
ops.library.define(
    f"linear_attention_backward(Tensor dout, {_INPUTS}, Tensor stats, Tensor? query_mask, Tensor? token_mask, str spec,"
    " bool packed, str backend) -> (Tensor dq, Tensor dk, Tensor dv)"
)
ops.library.define("gram_and_sum(Tensor a, Tensor b, str backend) -> (Tensor G, Tensor sum_a)")


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, q: Tensor, k: Tensor, v: Tensor, query_mask: Tensor | None, token_mask: Tensor | None,
        spec: Spec,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        kernel = ops.below_autograd("linear_attention_forward", backend, q, k, v)
        out, stats = kernel(q, k, v, query_mask, token_mask, spec)
        ctx.save_for_backward(q, k, v, stats, query_mask, token_mask)
        ctx.backend, ctx.spec = backend, spec
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return out, stats

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 7
        q, k, v, stats, *masks = ctx.saved_tensors
        operands = (dout.transpose(1, 2), q, k, v)
        known_plain = ops.plain(*operands)
        packed = known_plain and ops.writes_packed(ctx.backend, q, k, v)
        gradients = ops.call(
            "linear_attention_backward", ctx.backend, operands, stats, *masks, ctx.spec, packed, known_plain=known_plain
        )
        return None, *gradients, None, None, None


class _LinearAttentionBackward(torch.autograd.Function):
    """Its own backward applies autograd to the reference in the accumulate dtype: differentiable to any order."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, stats: Tensor,
        query_mask: Tensor | None, token_mask: Tensor | None, spec: Spec, packed: bool,
    ) -> Any:  # fmt: skip
        ctx.save_for_backward(dout, q, k, v, query_mask, token_mask)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        kernel = ops.below_autograd("linear_attention_backward", backend, dout, q, k, v)
        return kernel(dout, q, k, v, stats, query_mask, token_mask, spec, packed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, query_mask, token_mask = ctx.saved_tensors
        function = partial(
            reference.linear_attention, **ctx.spec.of_linear(), query_mask=query_mask, token_mask=token_mask
        )
        return None, *ops.differentiated_again(function, tensors, gradients), None, None, None, None, None


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, query_mask: Tensor | None, token_mask: Tensor | None, spec: str, backend: str
) -> tuple[Tensor, Tensor]:
    B, H, D, Dv = q.shape[0], q.shape[1], q.shape[-1], v.shape[-1]
    stats = q.new_empty((B, H, Spec.of_text(spec).statistics(D, Dv)), dtype=reference.accumulate_dtype(q.dtype))
    return ops.fake_results(q, backend).output(q, k, v), stats


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    def empty(size: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
        return q.new_empty(size, dtype=dtype)

    return tuple(layouts.empty_gradient(empty, x) for x in (q, k, v))


ops.register("linear_attention_forward", _fake_forward, _LinearAttention, ("q", "k", "v"))
ops.register("linear_attention_backward", _fake_backward, _LinearAttentionBackward)


# -------------------------------------------------------------------------------------------------------- composed


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
    if dispatch.has(backend, "layer_gram"):
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
    """The first D features of (B, H, N, D + 1) tokens, divided by the last: (B, H, N, D), token-major."""
    y: Tensor = _Quotient.apply(x.transpose(1, 2))
    return y.transpose(1, 2)


class _Quotient(torch.autograd.Function):
    """Writes its gradient once; autograd of two slices would add two zero-padded tensors."""

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
