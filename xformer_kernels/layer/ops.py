"""The layer in Gram form as two ops: layer_forward and layer_backward, with what torch wants to know of them.

They are made of the two passes (passes.py) and the algebra between them (algebra.py). Saved for backward are x, the
weights and C x C sized statistics; q, k and v do not exist, forward or backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from xformer_kernels import dispatch, ops, parallel, reference
from xformer_kernels.layer import algebra, passes
from xformer_kernels.reference import accumulate_dtype

OPERANDS = 9
_TENSORS = (
    "Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor temperature, Tensor proj_weight, Tensor? proj_bias,"
    " Tensor? ln_weight, Tensor? ln_bias, Tensor? layer_scale, Tensor? keep, Tensor? token_mask"
)
_CHOICES = "str map, str activation, float eps, float? ln_eps, bool residual, str group, str backend"
ops.library.define(
    f"layer_forward({_TENSORS}, {_CHOICES}) -> (Tensor y, Tensor S, Tensor M, Tensor cos, Tensor vectors)"
)
ops.library.define(
    f"layer_backward(Tensor dy, {_TENSORS}, Tensor S, Tensor M, Tensor cos, Tensor vectors, {_CHOICES})"
    " -> (Tensor dx, Tensor dqkv_weight, Tensor dqkv_bias, Tensor dtemperature, Tensor dproj_weight,"
    " Tensor dproj_bias, Tensor dln_weight, Tensor dln_bias, Tensor dlayer_scale)"
)


class Operands(NamedTuple):
    """The tensors of a call, in the order of the schema. ``keep`` (B, H, D, D) scales the map."""

    x: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    temperature: Tensor
    proj_weight: Tensor
    proj_bias: Tensor | None
    ln_weight: Tensor | None = None
    ln_bias: Tensor | None = None
    layer_scale: Tensor | None = None
    keep: Tensor | None = None
    token_mask: Tensor | None = None


class Choices(NamedTuple):
    """``ln_eps`` None: without layer norm; ``residual``: x is added; ``group``: name of a process group, or nothing."""

    map: str
    activation: str
    eps: float
    ln_eps: float | None
    residual: bool
    group: str
    backend: str

    @property
    def rule(self) -> algebra.Rule:
        return algebra.Rule(self.map, self.activation, self.eps)


def layer(*args: Any) -> Tensor:
    """y; the arguments are those of Operands and Choices."""
    y: Tensor = ops.run("layer_forward", _Layer, args[:OPERANDS], *args)[0]
    return y


def _weights(o: Operands) -> algebra.Weights:
    dtype = accumulate_dtype(o.x.dtype)
    W, H = o.qkv_weight.to(dtype), o.temperature.shape[0]
    b = W.new_zeros(W.shape[0]) if o.qkv_bias is None else o.qkv_bias.to(dtype)
    proj = o.proj_weight.to(dtype)
    proj_bias = proj.new_zeros(proj.shape[0]) if o.proj_bias is None else o.proj_bias.to(dtype)
    if o.ln_bias is not None:
        b = b + W @ o.ln_bias.to(dtype)
    if o.ln_weight is not None:
        W = W * o.ln_weight.to(dtype)
    if o.layer_scale is not None:
        scale = o.layer_scale.to(dtype)
        proj, proj_bias = proj * scale.unsqueeze(-1), proj_bias * scale
    return algebra.Weights(
        W.view(3, H, -1, W.shape[1]), b.view(3, H, -1), o.temperature.to(dtype), proj, proj_bias
    )  # fmt: skip


def _gradients(o: Operands, g: algebra.Gradients) -> tuple[Tensor, ...]:
    """From gradients of what _weights gives to those of what it is given; absent ones are empty."""
    dtype = accumulate_dtype(o.x.dtype)
    dW, db, dproj, dproj_bias = g.qkv.flatten(0, 2), g.qkv_bias.flatten(), g.proj, g.proj_bias
    dln_weight, dln_bias, dscale = (dW.new_empty(0) for _ in range(3))
    W = o.qkv_weight.to(dtype)
    if o.ln_weight is not None:
        dln_weight = (dW * W).sum(0).to(o.ln_weight.dtype)
        dW = dW * o.ln_weight.to(dtype)
    if o.ln_bias is not None:
        dln_bias = (db @ W).to(o.ln_bias.dtype)
        dW = dW + db.unsqueeze(-1) * o.ln_bias.to(dtype)
    if o.layer_scale is not None:
        scale = o.layer_scale.to(dtype)
        dscale = (dproj * o.proj_weight.to(dtype)).sum(1)
        if o.proj_bias is not None:
            dscale = dscale + dproj_bias * o.proj_bias.to(dtype)
        dscale = dscale.to(o.layer_scale.dtype)
        dproj, dproj_bias = dproj * scale.unsqueeze(-1), dproj_bias * scale
    return (
        dW.to(o.qkv_weight.dtype),
        dW.new_empty(0) if o.qkv_bias is None else db.to(o.qkv_bias.dtype),
        g.temperature.to(o.temperature.dtype),
        dproj.to(o.proj_weight.dtype),
        dW.new_empty(0) if o.proj_bias is None else dproj_bias.to(o.proj_bias.dtype),
        dln_weight,
        dln_bias,
        dscale,
    )


def _forward(*args: Any) -> tuple[Tensor, ...]:
    o, choices = Operands(*args[:11]), Choices(*args[11:])
    dispatch.note(choices.backend, "layer_forward")
    x, mask, backend = o.x, o.token_mask, choices.backend
    with ops.without_autocast(x):
        w = _weights(o)
        around, count = parallel.total(choices.group, *passes.sample(x, mask, choices.ln_eps))
        c = (around / count.clamp_min(1)).contiguous()  # kernels read it by address
        S, _, s = passes.gram(None, x, mask, c, choices.ln_eps, backend)
        n = s.new_full((x.shape[0], 1), x.shape[1]) if mask is None else mask.sum(1, keepdim=True).to(s.dtype)
        S, s, n = parallel.total(choices.group, S, s, n)
        m, statistics = algebra.forward(algebra.Sums(S, s, n, c), w, o.keep, choices.rule)
        y = passes.mix(
            x, statistics.M, m, x if choices.residual else None, None, None, c, choices.ln_eps, False, backend
        )
        if mask is not None:
            masked = w.proj_bias.to(x.dtype) + x if choices.residual else w.proj_bias.to(x.dtype)
            y = torch.where(mask.unsqueeze(-1), y, masked)
        vectors = torch.cat((s, n, c, statistics.norms.flatten(1)), 1)
    return y, S, statistics.M, statistics.cos, vectors


def _backward(*args: Any) -> tuple[Tensor, ...]:
    dy, o, (S, M, cos, vectors), choices = args[0], Operands(*args[1:12]), args[12:16], Choices(*args[16:])
    dispatch.note(choices.backend, "layer_backward")
    x, mask, backend = o.x, o.token_mask, choices.backend
    with ops.without_autocast(x):
        w = _weights(o)
        C, heads = x.shape[-1], w.qkv.shape[1:3]
        s, n, c, norms = vectors.split((C, 1, C, 2 * heads[0] * heads[1]), 1)
        c = c.contiguous()
        sums, statistics = algebra.Sums(S, s, n, c), algebra.Statistics(M, cos, norms.unflatten(1, (2, *heads)))
        dM, dm, _ = passes.gram(dy, x, mask, c, choices.ln_eps, backend)
        dM, dm = parallel.total(choices.group, dM, dm)
        R, r, g = algebra.backward(dM, dm, sums, w, o.keep, choices.rule, statistics)
        add = dy if choices.residual else None
        dx = passes.mix(dy, M.transpose(-2, -1), r, add, x, R, c, choices.ln_eps, True, backend)
        g = algebra.Gradients(*(t / parallel.size(choices.group) for t in g)) if choices.group else g
        if mask is not None:
            keep = mask.unsqueeze(-1)
            dx = torch.where(keep, dx, dy if choices.residual else 0)
            at_masked = torch.where(keep, 0, dy).sum((0, 1), dtype=g.proj_bias.dtype)
            g = g._replace(proj_bias=g.proj_bias + at_masked)
    return dx, *_gradients(o, g)


# ------------------------------------------------------------------------------------------------------------- autograd


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        y, *saved = ops.below_autograd("layer_forward", *args)
        ctx.save_for_backward(*args[:11], *saved)
        ctx.choices = args[11:]
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        return y, *saved

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        operands = ctx.saved_tensors
        if dy is None:
            return (None,) * 18
        args = (dy, *operands, *ctx.choices)
        grads = ops.run("layer_backward", _LayerBackward, args[: OPERANDS + 1], *args)
        present = (g if o is not None else None for g, o in zip(grads, operands, strict=False))
        return (*present, *(None,) * 9)


class _LayerBackward(torch.autograd.Function):
    """Its own backward is autograd's, of the reference in the accumulate dtype: right to any order."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        ctx.save_for_backward(*args[:12])
        ctx.choices = args[16:]
        ctx.set_materialize_grads(False)
        # results that are no views may be modified in place
        return tuple(g.clone() if g._is_view() else g for g in ops.below_autograd("layer_backward", *args))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, choices = ctx.saved_tensors, Choices(*ctx.choices)
        if choices.group:
            raise NotImplementedError("second derivatives of a layer whose tokens are split over ranks (group=...)")
        dtype = accumulate_dtype(tensors[1].dtype)
        again = torch.is_grad_enabled()
        with torch.enable_grad(), ops.without_autocast(tensors[1]):
            # new points to differentiate at, connected to the old ones in case the result is differentiated too
            points = {
                i: x.to(dtype).view_as(x) if x.requires_grad else x.detach().to(dtype).requires_grad_()
                for i, x in enumerate(tensors[: OPERANDS + 1])
                if x is not None
            }
            operands: list[Any] = [points.get(i) for i in range(1, OPERANDS + 1)]
            y = _reference(Operands(*operands, *tensors[OPERANDS + 1 :]), choices)
            there = [i for i in points if i > 0]
            first = torch.autograd.grad(y, [points[i] for i in there], points[0], create_graph=True)
            given = [(x, grads[i - 1]) for x, i in zip(first, there, strict=True)]
            pairs = [(x, g.to(dtype)) for x, g in given if g is not None]
            second = torch.autograd.grad(
                [x for x, _ in pairs],
                list(points.values()),
                [g for _, g in pairs],
                allow_unused=True,
                create_graph=again,
            )
        result: list[Tensor | None] = [None] * 23
        for i, g in zip(points, second, strict=True):
            result[i] = None if g is None else g.to(tensors[i].dtype)
        return tuple(result)


def _reference(o: Operands, choices: Choices) -> Tensor:
    dropped = o.keep
    return reference.xfa_block(
        *o[:9],
        ln_eps=choices.ln_eps,
        residual=choices.residual,
        map=choices.map,
        activation=choices.activation,
        eps=choices.eps,
        token_mask=o.token_mask,
        map_fn=None
        if dropped is None
        else lambda scaled: reference.activate(scaled, choices.map, choices.activation) * dropped,
    )


# --------------------------------------------------------------------------------------------------------------- fakes


def _fake_forward(*args: Any) -> tuple[Tensor, ...]:
    o = Operands(*args[:11])
    B, N, C = o.x.shape
    H, inner, O = o.temperature.shape[0], o.qkv_weight.shape[0] // 3, o.proj_weight.shape[0]  # noqa: E741
    D, dtype = inner // H, accumulate_dtype(o.x.dtype)
    sizes = ((B, C, C), (B, O, C), (B, H, D, D), (B, 2 * C + 1 + 2 * inner))
    return o.x.new_empty(B, N, O), *(o.x.new_empty(size, dtype=dtype) for size in sizes)


def _fake_backward(_: Tensor, *args: Any) -> tuple[Tensor, ...]:
    o = Operands(*args[:11])
    dtype = accumulate_dtype(o.x.dtype)
    return o.x.new_empty(o.x.shape), *(
        o.x.new_empty(0, dtype=dtype) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in o[1:OPERANDS]
    )


ops.register("layer_forward", _fake_forward, _Layer, slice(0, OPERANDS), (), _forward)
ops.register("layer_backward", _fake_backward, _LayerBackward, slice(0, OPERANDS + 1), (), _backward)
