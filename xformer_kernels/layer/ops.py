"""The layer in Gram form as two ops, layer_forward and layer_backward, with their autograd and fake functions.

They are composed of the two passes (passes.py) and the algebra between them (algebra.py and maps.py). x, the weights
and statistics of size C x C are saved for backward; q, k and v are never computed, neither in forward nor in backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from xformer_kernels import autocast, dispatch, ops, parallel, reference
from xformer_kernels.layer import algebra, maps, passes
from xformer_kernels.reference import accumulate_dtype
from xformer_kernels.spec import Spec

_OPERANDS = (
    "Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor temperature, Tensor proj_weight, Tensor? proj_bias,"
    " Tensor? ln_weight, Tensor? ln_bias, Tensor? layer_scale"
)
_SAVED = "Tensor S, Tensor M, Tensor cos, Tensor vectors"
_CHOICES = "Tensor? keep, Tensor? token_mask, str spec, float? ln_eps, bool residual, str group, str backend"
ops.library.define(f"layer_forward({_OPERANDS}, {_CHOICES}) -> (Tensor y, {_SAVED})")
ops.library.define(
    f"layer_backward(Tensor dy, {_OPERANDS}, {_SAVED}, {_CHOICES})"
    " -> (Tensor dx, Tensor dqkv_weight, Tensor dqkv_bias, Tensor dtemperature, Tensor dproj_weight,"
    " Tensor dproj_bias, Tensor dln_weight, Tensor dln_bias, Tensor dlayer_scale)"
)


class Operands(NamedTuple):
    """The tensors of a call that may have gradients, in the order of the schema."""

    x: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    temperature: Tensor
    proj_weight: Tensor
    proj_bias: Tensor | None
    ln_weight: Tensor | None = None
    ln_bias: Tensor | None = None
    layer_scale: Tensor | None = None


class Saved(NamedTuple):
    """What forward saves for backward in addition to the operands."""

    S: Tensor
    M: Tensor
    cos: Tensor
    vectors: Tensor


class Choices(NamedTuple):
    """``keep`` (B, H, D, D) multiplies the map. ``ln_eps`` None: no layer norm. ``residual``: whether x is added.
    ``group``: name of a process group, or empty."""

    keep: Tensor | None
    token_mask: Tensor | None
    spec: Spec
    ln_eps: float | None
    residual: bool
    group: str

    def rule(self) -> maps.Rule:
        return maps.Rule(self.spec.map, self.spec.activation, self.spec.eps, self.spec.norm == "token")


def _passes(backend: str, o: Operands) -> passes.Passes:
    return passes.of(backend, accumulate_dtype(o.x.dtype), o.proj_weight.shape[1] // o.temperature.shape[0])


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
    """Gradients of the operands of _weights from those of its results; empty tensors for absent operands."""
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


def _forward(backend: str, *args: Any) -> tuple[Tensor, ...]:
    o, choices, _ = ops.records(args, Operands, Choices)
    dispatch.note(backend, "layer_forward")
    x, mask, use = o.x, choices.token_mask, _passes(backend, o)
    heads = x.unsqueeze(1)
    with autocast.disabled(x):
        w = _weights(o)
        around, count = parallel.total(choices.group, *use.sample(x, mask, choices.ln_eps))
        c = (around / count.clamp_min(1)).contiguous()  # the kernels assume contiguous memory
        S, _, s = (t.squeeze(1) for t in use.gram(heads, heads, True, mask, c, choices.ln_eps))
        n = s.new_full((x.shape[0], 1), x.shape[1]) if mask is None else mask.sum(1, keepdim=True).to(s.dtype)
        S, s, n = parallel.total(choices.group, S, s, n)
        m, statistics = algebra.forward(algebra.Sums(S, s, n, c), w, choices.keep, choices.rule(), use.maps)
        operands = passes.with_head(x, statistics.M, m, x if choices.residual else None, None, None)
        y = passes.without_head(use.mix(*operands, c, choices.ln_eps, False))
        if mask is not None:
            masked = w.proj_bias.to(x.dtype) + x if choices.residual else w.proj_bias.to(x.dtype)
            y = torch.where(mask.unsqueeze(-1), y, masked)
        vectors = torch.cat((s, n, c, statistics.norms.flatten(1)), 1)
    return y, *Saved(S, statistics.M, statistics.cos, vectors)


def _backward(backend: str, dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    o, saved, choices, _ = ops.records(args, Operands, Saved, Choices)
    dispatch.note(backend, "layer_backward")
    x, mask, use = o.x, choices.token_mask, _passes(backend, o)
    with autocast.disabled(x):
        w = _weights(o)
        C, (H, D) = x.shape[-1], w.qkv.shape[1:3]
        s, n, c, norms = saved.vectors.split((C, 1, C, 2 * H * D), 1)
        c = c.contiguous()
        sums = algebra.Sums(saved.S, s, n, c)
        statistics = algebra.Statistics(saved.M, saved.cos, norms.unflatten(1, (2, H, D)))
        tokens = (dy.unsqueeze(1), x.unsqueeze(1))
        dM, dm, _ = (t.squeeze(1) for t in use.gram(*tokens, False, mask, c, choices.ln_eps))
        dM, dm = parallel.total(choices.group, dM, dm)
        R, r, g = algebra.backward(dM, dm, sums, w, choices.keep, choices.rule(), statistics, use.maps_backward)
        add = dy if choices.residual else None
        operands = passes.with_head(dy, saved.M.transpose(-2, -1), r, add, x, R)
        dx = passes.without_head(use.mix(*operands, c, choices.ln_eps, True))
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
    def forward(ctx: Any, backend: str, *args: Any) -> tuple[Tensor, ...]:
        o, choices, _ = ops.records(args, Operands, Choices)
        y, *saved = ops.below_autograd("layer_forward", backend, *o)(*args)
        ctx.save_for_backward(*o, *saved, choices.keep, choices.token_mask)
        ctx.backend, ctx.choices = backend, choices._replace(keep=None, token_mask=None)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        return y, *saved

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        o, saved, (keep, token_mask) = ops.records(ctx.saved_tensors, Operands, Saved)
        none = (None,) * len(Choices._fields)
        if dy is None:
            return None, *((None,) * len(o)), *none
        choices = ctx.choices._replace(keep=keep, token_mask=token_mask)
        grads = ops.call("layer_backward", ctx.backend, (dy, *o), *saved, *choices)
        return None, *(None if t is None else g for g, t in zip(grads, o, strict=True)), *none


class _LayerBackward(torch.autograd.Function):
    """Its own backward applies autograd to the reference in the accumulate dtype: differentiable to any order."""

    @staticmethod
    def forward(ctx: Any, backend: str, dy: Tensor, *args: Any) -> Any:
        o, _, choices, _ = ops.records(args, Operands, Saved, Choices)
        ctx.save_for_backward(dy, *o, choices.keep, choices.token_mask)
        ctx.choices = choices._replace(keep=None, token_mask=None)
        ctx.set_materialize_grads(False)
        grads = ops.below_autograd("layer_backward", backend, dy, *o)(dy, *args)
        # clone views, since only results that are not views may be modified in place
        return tuple(g.clone() if g._is_view() else g for g in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, keep, token_mask = ctx.saved_tensors
        choices = ctx.choices._replace(keep=keep, token_mask=token_mask)
        if choices.group:
            raise NotImplementedError("second derivatives of a layer whose tokens are split over ranks (group=...)")
        dtype = accumulate_dtype(tensors[1].dtype)
        again = torch.is_grad_enabled()
        with torch.enable_grad(), autocast.disabled(tensors[1]):
            # new tensors to differentiate at, connected to the old ones in case the result is differentiated again
            points = [
                None if x is None else x.to(dtype).view_as(x) if x.requires_grad else x.detach().to(dtype)
                for x in tensors
            ]
            dy, *operands = (x if x is None or x.requires_grad else x.requires_grad_() for x in points)
            y = _reference(Operands(*operands), choices)  # type: ignore[arg-type]
            there = [x for x in operands if x is not None]
            first = torch.autograd.grad(y, there, dy, create_graph=True)
            wanted = [g for x, g in zip(operands, grads, strict=True) if x is not None]
            pairs = [(x, g.to(dtype)) for x, g in zip(first, wanted, strict=True) if g is not None]
            second = torch.autograd.grad(
                [x for x, _ in pairs], [dy, *there], [g for _, g in pairs], allow_unused=True, create_graph=again
            )
        found = iter(second)
        result = [None if x is None else next(found) for x in tensors]
        result = [None if g is None else g.to(x.dtype) for x, g in zip(tensors, result, strict=True)]
        return None, *result, *((None,) * (len(Saved._fields) + len(Choices._fields)))


def _reference(o: Operands, choices: Choices) -> Tensor:
    dropped, spec = choices.keep, choices.spec
    return reference.xfa_block(
        *o,
        ln_eps=choices.ln_eps,
        residual=choices.residual,
        **spec.of_xfa(),
        token_mask=choices.token_mask,
        map_fn=None if dropped is None else lambda scaled: reference.activate(scaled, spec) * dropped,
    )


# --------------------------------------------------------------------------------------------------------------- fakes


def _fake_forward(*args: Any) -> tuple[Tensor, ...]:
    o, _ = ops.records(args, Operands)
    B, N, C = o.x.shape
    H, inner, O = o.temperature.shape[0], o.qkv_weight.shape[0] // 3, o.proj_weight.shape[0]  # noqa: E741
    D, dtype = inner // H, accumulate_dtype(o.x.dtype)
    sizes = Saved((B, C, C), (B, O, C), (B, H, D, D), (B, 2 * C + 1 + 2 * inner))  # type: ignore[arg-type]
    return o.x.new_empty(B, N, O), *(o.x.new_empty(size, dtype=dtype) for size in sizes)


def _fake_backward(_: Tensor, *args: Any) -> tuple[Tensor, ...]:
    o, _ = ops.records(args, Operands)
    x, *weights = o
    dtype = accumulate_dtype(x.dtype)
    return x.new_empty(x.shape), *(
        x.new_empty(0, dtype=dtype) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in weights
    )


ops.register("layer_forward", _fake_forward, _Layer, composed=_forward)
ops.register("layer_backward", _fake_backward, _LayerBackward, composed=_backward)
