"""The ops as torch sees them: schemas, kernels, fakes, autograd and autocast.

    xfa_forward  -> (out, stats)             xfa_backward -> (dqkv, dtemperature)
    gram         -> (G, ssq_a, ssq_b)        channel_mix  -> y

Tokens are (B, H, N, D) of any strides, temperature is (H,), token_mask (B, N) bool, weights (B, H, O, I), bias and
add_scale (B, H, O). ``out`` and ``y`` are contiguous (B, N, H, D): the functions below transpose them outside of the
autograd.Function, whose results may be modified in place only if they are no views. ``stats`` is one
(B, H, D * D + 2 * D) tensor in the accumulate dtype, meant for the same backend's backward: nothing of size N is saved.
``dqkv`` is one (3, B, N, H, D) tensor: allocators reuse one large buffer where they give three back to the system.
``backend`` names a kernel backend; the reference is not behind an op.

The functions ``xfa``, ``gram`` and ``channel_mix`` below are how :mod:`xformer_kernels.functional` calls the ops. In
plain eager mode they take the same autograd.Function or backend function that the dispatcher would reach, without the
trip: a trip through a Python-registered op costs as much as the whole kernel does on a small tensor.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from xformer_kernels import dispatch, reference

library = torch.library.Library("xformer_kernels", "DEF")
_CHOICES = "str map, str norm, str activation, float eps, str backend"
library.define(
    f"xfa_forward(Tensor q, Tensor k, Tensor v, Tensor temperature, Tensor? token_mask, {_CHOICES})"
    " -> (Tensor out, Tensor stats)"
)
library.define(
    "xfa_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor temperature, Tensor stats, Tensor? token_mask,"
    f" {_CHOICES}) -> (Tensor dqkv, Tensor dtemperature)"
)
library.define(
    "gram(Tensor a, Tensor b, bool symmetric, Tensor? token_mask, str backend)"
    " -> (Tensor G, Tensor ssq_a, Tensor ssq_b)"
)
library.define(
    "channel_mix(Tensor x, Tensor weight, Tensor? bias, Tensor? add, Tensor? add_scale, Tensor? x2, Tensor? weight2,"
    " str backend) -> Tensor"
)
_ops = torch.ops.xformer_kernels


# ------------------------------------------------------------------------------------------------- eager without a trip

_PLAIN = (Tensor, Parameter)
_length_of_dispatch_stack = torch._C._len_torch_dispatch_stack
_length_of_function_stack = torch._C._len_torch_function_stack
_functorch = torch._C._functorch.peek_interpreter_stack


_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
_profiler = torch.autograd.profiler


def plain(*tensors: Tensor | None) -> bool:
    """True if nothing but the kernel has to see this call.

    No compiler, tracer, mode or transform, no tensor subclass, no view that negates its memory's numbers.
    """
    return (
        not torch.compiler.is_compiling()
        and not _length_of_dispatch_stack()
        and not _length_of_function_stack()
        and _functorch() is None
        and torch._C._get_tracing_state() is None
        and torch.autograd.forward_ad._current_level < 0
        # gradients that torch.autograd.grad batches (is_grads_batched) have the type Tensor too
        and all(t is None or (type(t) in _PLAIN and not t.is_neg() and not _is_legacy_batched(t)) for t in tensors)
    )


def torch_only(*tensors: Tensor | None) -> bool:
    """Whether torch's own operations must compute this call, because they alone have rules for it.

    Under the transforms of torch.func (vmap, grad, jvp) and forward-mode AD, and for tensor subclasses with a
    ``__torch_dispatch__`` of their own: quantized weights, DTensor.
    """
    for t in tensors:
        if t is not None and type(t) not in _PLAIN and _dispatches(type(t)):
            return True
    return not torch.compiler.is_compiling() and (
        _functorch() is not None or torch.autograd.forward_ad._current_level >= 0
    )


def _dispatches(kind: type[Tensor]) -> bool:
    """Whether a tensor subclass decides what operators do; torch's own FakeTensor and FunctionalTensor know ours."""
    own = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__  # type: ignore[comparison-overlap]
    return own and not kind.__module__.startswith("torch._subclasses.")


def _implementation(op: str, args: tuple[Any, ...]) -> Any:
    """What the op computes: the kernel of the backend, which is the last argument, or a function of several kernels."""
    if op in _composed:
        return _composed[op](*args)
    return dispatch.kernel(args[-1], op)(*args[:-1])


_composed: dict[str, Any] = {}


def wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def run(op: str, function: type[torch.autograd.Function], operands: tuple[Tensor | None, ...], *args: Any) -> Any:
    """Calls `op` on `args` (the last one is the backend); `operands` are its differentiable tensors."""
    if plain(*operands) and not _profiler._is_profiler_enabled:  # a profiler sees what the dispatcher calls
        return function.apply(*args) if wants_grad(*operands) else _implementation(op, args)
    return getattr(_ops, op)(*args)


def below_autograd(op: str, *args: Any) -> Any:
    """What the autograd.Functions compute: the kernel, or in any other than plain eager mode the op below autograd."""
    if plain(*(x for x in args if isinstance(x, Tensor))):
        return _implementation(op, args)
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(_ops, op)(*args)


def xfa(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, *choices: Any) -> Tensor:
    """(B, H, N, D); `choices` are token_mask, map, norm, activation, eps, backend."""
    out: Tensor = run("xfa_forward", _Xfa, (q, k, v, temperature), q, k, v, temperature, *choices)[0]
    return out.transpose(1, 2)


def gram(
    a: Tensor, b: Tensor, symmetric: bool, token_mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = run("gram", _Gram, (a, b), a, b, symmetric, token_mask, backend)
    return result


def channel_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    add_scale: Tensor | None = None,
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
    *,
    backend: str,
) -> Tensor:
    """(B, H, N, O)."""
    operands = (x, weight, bias, add, add_scale, x2, weight2)
    y: Tensor = run("channel_mix", _ChannelMix, operands, *operands, backend)
    return y.transpose(1, 2)


# ------------------------------------------------------------------------------------------------------------- autograd


class _Xfa(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, *choices: Any) -> tuple[Tensor, Tensor]:
        out, stats = below_autograd("xfa_forward", q, k, v, temperature, *choices)
        ctx.save_for_backward(q, k, v, temperature, stats, choices[0])
        ctx.choices = choices[1:]
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return out, stats

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 10
        args = (dout.transpose(1, 2), *ctx.saved_tensors)
        dqkv, dtemperature = run("xfa_backward", _XfaBackward, args[:5], *args, *ctx.choices)
        # views that may be modified in place, which those of unbind may not
        dqkv = dqkv.transpose(2, 3)
        return (dqkv.select(0, 0), dqkv.select(0, 1), dqkv.select(0, 2), dtemperature, *(None,) * 6)


class _XfaBackward(torch.autograd.Function):
    """Its own backward is autograd's, of the reference in the accumulate dtype: right to any order."""

    @staticmethod
    def forward(ctx: Any, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, *rest: Any) -> Any:
        ctx.save_for_backward(dout, q, k, v, temperature, rest[1])
        ctx.choices = rest[2:]
        ctx.set_materialize_grads(False)
        return below_autograd("xfa_backward", dout, q, k, v, temperature, *rest)

    @staticmethod
    def backward(ctx: Any, ddqkv: Tensor | None, ddtemperature: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = (*((None,) * 3 if ddqkv is None else ddqkv.transpose(2, 3).unbind(0)), ddtemperature)
        *tensors, token_mask = ctx.saved_tensors
        map, norm, activation, eps, _ = ctx.choices
        dtype = reference.accumulate_dtype(tensors[1].dtype)
        again = torch.is_grad_enabled()
        with torch.enable_grad(), without_autocast(tensors[1]):
            # new points to differentiate at, connected to the old ones in case the result is differentiated too
            points = [x.to(dtype).view_as(x) if x.requires_grad else x.detach().to(dtype) for x in tensors]
            dout, *inputs = (x if x.requires_grad else x.requires_grad_() for x in points)
            out = reference.xfa(*inputs, map=map, norm=norm, activation=activation, eps=eps, token_mask=token_mask)
            first = torch.autograd.grad(out, inputs, dout, create_graph=True)
            pairs = [(x, g.to(dtype)) for x, g in zip(first, grads, strict=True) if g is not None]
            second = torch.autograd.grad(
                [x for x, _ in pairs], [dout, *inputs], [g for _, g in pairs], allow_unused=True, create_graph=again
            )
        result = (None if g is None else g.to(x.dtype) for x, g in zip(tensors, second, strict=True))
        return (*result, *(None,) * 7)


def _masked(x: Tensor, token_mask: Tensor | None) -> Tensor:
    return x if token_mask is None else torch.where(token_mask[:, None, :, None], x, 0)


class _Gram(torch.autograd.Function):
    """da = b dG^T + 2 dssq_a a and db = a dG + 2 dssq_b b, each one channel_mix: differentiable to any order."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, symmetric: bool, token_mask: Tensor | None, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(a, b, token_mask)
        ctx.symmetric, ctx.backend = symmetric, backend
        result: tuple[Tensor, Tensor, Tensor] = below_autograd("gram", a, b, symmetric, token_mask, backend)
        return result

    @staticmethod
    def backward(ctx: Any, dG: Tensor, dssq_a: Tensor, dssq_b: Tensor) -> tuple[Tensor | None, ...]:
        a, b, token_mask = ctx.saved_tensors
        a, b = _masked(a, token_mask), _masked(b, token_mask)
        da = db = None
        if ctx.symmetric:
            weight, scale = dG + dG.transpose(-2, -1), 2 * (dssq_a + dssq_b)
            da = channel_mix(a, weight, add=a, add_scale=scale, backend=ctx.backend)
        else:
            if ctx.needs_input_grad[0]:
                da = channel_mix(b, dG, add=a, add_scale=2 * dssq_a, backend=ctx.backend)
            if ctx.needs_input_grad[1]:
                db = channel_mix(a, dG.transpose(-2, -1), add=b, add_scale=2 * dssq_b, backend=ctx.backend)
        return da, db, None, None, None


class _ChannelMix(torch.autograd.Function):
    """dx = channel_mix(dy, weight^T) and dweight = gram(dy, x): differentiable to any order."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *operands, backend = args
        ctx.save_for_backward(*operands)
        ctx.backend = backend
        y: Tensor = below_autograd("channel_mix", *args)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, add, add_scale, x2, weight2 = ctx.saved_tensors
        needed, dy = ctx.needs_input_grad, dy.transpose(1, 2)

        def of_tokens(weight: Tensor) -> Tensor:
            return channel_mix(dy, weight.transpose(-2, -1), backend=ctx.backend)

        def of_weight(x: Tensor, weight: Tensor) -> Tensor:
            return gram(dy, x, False, None, ctx.backend)[0].to(weight.dtype)

        def of_vector(product: Tensor, vector: Tensor) -> Tensor:
            return product.sum(-2, dtype=reference.accumulate_dtype(dy.dtype)).to(vector.dtype)

        dadd = None
        if needed[3]:
            dadd = dy if add_scale is None else (dy * add_scale.unsqueeze(-2)).to(dy.dtype)
        return (
            of_tokens(weight) if needed[0] else None,
            of_weight(x, weight) if needed[1] else None,
            of_vector(dy, bias) if needed[2] else None,
            dadd,
            of_vector(dy.to(add_scale.dtype) * add, add_scale) if needed[4] else None,
            of_tokens(weight2) if needed[5] else None,
            of_weight(x2, weight2) if needed[6] else None,
            None,
        )


# --------------------------------------------------------------------------------------------------- kernels and fakes


def _token_major(x: Tensor, features: Any) -> Tensor:
    B, H, N, _ = x.shape
    return x.new_empty((B, N, H, features))


def _fake_xfa_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, H, D = q.shape[0], q.shape[1], q.shape[-1]
    return _token_major(q, D), q.new_empty((B, H, D * D + 2 * D), dtype=reference.accumulate_dtype(q.dtype))


def _fake_xfa_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, *_: Any) -> Any:
    B, H, N, D = q.shape
    return q.new_empty((3, B, N, H, D)), torch.empty_like(temperature, memory_format=torch.contiguous_format)


def _fake_gram(a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, H, Da, Db = a.shape[0], a.shape[1], a.shape[-1], b.shape[-1]
    dtype = reference.accumulate_dtype(a.dtype)
    G, ssq_a, ssq_b = (a.new_empty(size, dtype=dtype) for size in ((B, H, Da, Db), (B, H, Da), (B, H, Db)))
    return G, ssq_a, ssq_b


def _fake_channel_mix(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return _token_major(x, weight.shape[-2])


def _autocast_on(x: Tensor) -> bool:
    device_type = x.device.type
    # is_autocast_enabled refuses devices that have no autocast; torch.compile of torch 2.11 cannot trace the question
    has_autocast = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return has_autocast and torch.is_autocast_enabled(device_type)


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tokens in the dtype that autocast asks for on the device of x, as it would for a matmul; float64 stays."""
    if not _autocast_on(x):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and _castable(t) else t for t in (x, *others))


def autocast_weights(x: Tensor, *weights: Any) -> tuple[Any, ...]:
    """With autocast on, weights of neither the dtype of x nor its accumulate dtype in that of x, as F.linear does."""
    if not _autocast_on(x):
        return weights
    accepted = (x.dtype, reference.accumulate_dtype(x.dtype))
    return tuple(
        w.to(x.dtype) if isinstance(w, Tensor) and w.dtype not in accepted and _castable(w) else w for w in weights
    )


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A region in which operators compute in the dtypes that they are given."""
    return torch.autocast(x.device.type, enabled=False) if _autocast_on(x) else nullcontext()


def _castable(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype != torch.float64


def register(
    op: str,
    fake: Any,
    function: type[torch.autograd.Function],
    operands: slice,
    tokens: tuple[int, ...],
    composed: Any = None,
) -> None:
    """`operands`: the differentiable arguments; `tokens`: the arguments that autocast casts.

    `composed` computes an op that is no kernel of a backend, from all its arguments.
    """
    if composed is not None:
        _composed[op] = composed
    overload = getattr(_ops, op).default

    def kernel(*args: Any) -> Any:
        return _implementation(op, args)

    def autograd(*args: Any) -> Any:
        if wants_grad(*args[operands]) or torch.autograd.forward_ad._current_level >= 0:
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    def under_autocast(*args: Any) -> Any:
        cast = dict(zip(tokens, autocast(*(args[i] for i in tokens)), strict=True))
        with torch._C._DisableAutocast():
            return overload(*(cast.get(i, arg) for i, arg in enumerate(args)))

    library.impl(op, kernel, "CompositeExplicitAutograd")
    library.impl(op, autograd, "Autograd")
    if tokens:
        for key in ("AutocastCPU", "AutocastCUDA"):
            library.impl(op, under_autocast, key)
    torch.library.register_fake(f"xformer_kernels::{op}", fake, lib=library)


register("xfa_forward", _fake_xfa_forward, _Xfa, slice(0, 4), (0, 1, 2))
register("xfa_backward", _fake_xfa_backward, _XfaBackward, slice(0, 5), ())
register("gram", _fake_gram, _Gram, slice(0, 2), (0, 1))
register("channel_mix", _fake_channel_mix, _ChannelMix, slice(0, 7), (0, 3, 5))
