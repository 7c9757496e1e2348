"""Registration of the ops: schemas, kernels, fakes, autograd and autocast; and :func:`call`, which runs an op.

    xfa_forward  -> (out, stats)             xfa_backward -> (dqkv, dtemperature)
    gram         -> (G, ssq_a, ssq_b)        channel_mix  -> y

Tokens are (B, H, N, D) with any strides, temperature is (H,), token_mask (B, N) bool, weights (B, H, O, I), bias and
add_scale (B, H, O). ``out`` and ``y`` are (B, N, H, D), contiguous except for ``out`` of a backend that keeps layouts
(see :class:`xformer_kernels.backends.layouts.Results`). Callers transpose them outside of the autograd.Function, whose
results may be modified in place only if they are not views. ``stats`` is one (B, H, D * D + 2 * D) tensor in the
accumulate dtype, read only by the same backend's backward: no additional tensor of size N is saved. ``dqkv`` is one
(3, B, N, H, D) tensor, because allocators tend to reuse one large buffer but return three to the system. With
``packed``, which the autograd.Function sets in plain eager mode if q, k and v are parts of one packed tensor, a backend
that keeps layouts gives ``dqkv`` the memory order of that tensor.
``spec`` is the text of a :class:`xformer_kernels.spec.Spec`. ``backend`` names a kernel backend; the reference is not
called through an op.

The arguments of an op are its operands (the tensors that may have gradients), then the other arguments, then the
backend. A backend's function takes the first two groups, with a Spec in place of its text; an autograd.Function takes
the backend first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from xformer_kernels import autocast, dispatch, reference
from xformer_kernels import torch_internals as internals
from xformer_kernels._ops import add_op_namespace_prefix
from xformer_kernels._ops import ops as _ops
from xformer_kernels.backends import layouts
from xformer_kernels.spec import Spec

library = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "DEF")
library.define(
    "xfa_forward(Tensor q, Tensor k, Tensor v, Tensor temperature, Tensor? token_mask, str spec, str backend)"
    " -> (Tensor out, Tensor stats)"
)
library.define(
    "xfa_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor temperature, Tensor stats, Tensor? token_mask,"
    " str spec, bool packed, str backend) -> (Tensor dqkv, Tensor dtemperature)"
)
library.define(
    "gram(Tensor a, Tensor b, bool symmetric, Tensor? token_mask, str backend)"
    " -> (Tensor G, Tensor ssq_a, Tensor ssq_b)"
)
library.define(
    "channel_mix(Tensor x, Tensor weight, Tensor? bias, Tensor? add, Tensor? add_scale, Tensor? x2, Tensor? weight2,"
    " str backend) -> Tensor"
)


# ------------------------------------------------------------------------------------------------- eager without a trip

_PLAIN = (Tensor, Parameter)


def plain(*tensors: Tensor | None) -> bool:
    """True if the kernel can be called directly, without the dispatcher.

    This requires that no compiler, tracer, mode or transform is active, and that no tensor is a subclass, nested or a
    negated view (``Tensor.is_neg``).
    """
    if (
        torch.compiler.is_compiling()
        or internals.dispatch_modes()
        or internals.function_modes()
        or internals.transform() is not None
        or internals.tracing_state() is not None
        or internals.forward_ad_is_on()
    ):
        return False
    for t in tensors:
        # batched gradients of torch.autograd.grad(is_grads_batched=True) have the type Tensor as well
        if t is not None and (type(t) not in _PLAIN or t.is_nested or t.is_neg() or internals.is_legacy_batched(t)):
            return False
    return True


def torch_only(*tensors: Tensor | None) -> bool:
    """Whether this call must be computed by torch's own operators, because only they support it.

    True under the transforms of torch.func (vmap, grad, jvp) and forward-mode AD, and for tensor subclasses that define
    ``__torch_dispatch__``: quantized weights, DTensor.
    """
    for t in tensors:
        if t is not None and type(t) not in _PLAIN and _dispatches(type(t)):
            return True
    return not torch.compiler.is_compiling() and (internals.transform() is not None or internals.forward_ad_is_on())


def _dispatches(kind: type[Tensor]) -> bool:
    """Whether a subclass overrides operators; torch's own FakeTensor and FunctionalTensor support our ops."""
    own = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__  # type: ignore[comparison-overlap]
    return own and not kind.__module__.startswith("torch._subclasses.")


def wants_grad(*tensors: Any) -> bool:
    """Whether autograd records a call with these arguments; arguments that are not tensors are ignored."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def records(args: Sequence[Any], *kinds: Any) -> list[Any]:
    """Splits arguments into NamedTuples of the given `kinds`, and a list of the remaining arguments."""
    rest = iter(args)
    return [*(kind(*islice(rest, len(kind._fields))) for kind in kinds), list(rest)]


_functions: dict[str, type[torch.autograd.Function]] = {}
_composed: dict[str, Callable[..., Any]] = {}


def call(op: str, backend: str, operands: tuple[Tensor | None, ...], *others: Any, known_plain: bool = False) -> Any:
    """Runs an op: in plain eager mode through the backend's function or autograd.Function, else through the dispatcher.

    Dispatching a Python-registered op costs as much as the whole kernel does on a small tensor. `known_plain`:
    :func:`plain` is true for the operands.
    """
    if (known_plain or plain(*operands)) and not internals.profiler_is_on():  # a profiler only sees dispatched ops
        if wants_grad(*operands):
            return _functions[op].apply(backend, *operands, *others)
        return _kernel(op, backend)(*operands, *others)
    return _dispatched(op, backend)(*operands, *others)


def below_autograd(op: str, backend: str, *operands: Tensor | None) -> Callable[..., Any]:
    """What an autograd.Function calls: the kernel in plain eager mode, otherwise the op below autograd."""
    return _kernel(op, backend) if plain(*operands) else partial(_op_below_autograd, op, backend)


def _op_below_autograd(op: str, backend: str, *args: Any) -> Any:
    with internals.below_autograd():
        return _dispatched(op, backend)(*args)


def _kernel(op: str, backend: str) -> Callable[..., Any]:
    """The kernel of the backend, or a function composed of several kernels."""
    if op in _composed:
        return partial(_composed[op], backend)
    return dispatch.kernel(backend, op)


def channel_mix(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    add_scale: Tensor | None = None,
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
) -> Tensor:
    """(B, H, N, O), a view of the op's result."""
    y: Tensor = call("channel_mix", backend, (x, weight, bias, add, add_scale, x2, weight2))
    return y.transpose(1, 2)


def _dispatched(op: str, backend: str) -> Callable[..., Any]:
    return lambda *args: getattr(_ops, op)(*(x.text() if isinstance(x, Spec) else x for x in args), backend)


# ------------------------------------------------------------------------------------------------------------- autograd


class _Xfa(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, token_mask: Tensor | None,
        spec: Spec,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        kernel = below_autograd("xfa_forward", backend, q, k, v, temperature)
        out, stats = kernel(q, k, v, temperature, token_mask, spec)
        ctx.save_for_backward(q, k, v, temperature, stats, token_mask)
        ctx.backend, ctx.spec = backend, spec
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return out, stats

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 7
        q, k, v, temperature, stats, token_mask = ctx.saved_tensors
        operands = (dout.transpose(1, 2), q, k, v, temperature)
        known_plain = plain(*operands)
        packed = known_plain and writes_packed(ctx.backend, q, k, v)
        dqkv, dtemperature = call(
            "xfa_backward", ctx.backend, operands, stats, token_mask, ctx.spec, packed, known_plain=known_plain
        )
        # select, since its views may be modified in place, unlike those of unbind
        dqkv = dqkv.transpose(2, 3)
        return None, dqkv.select(0, 0), dqkv.select(0, 1), dqkv.select(0, 2), dtemperature, None, None


def writes_packed(backend: str, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a backward in plain eager mode may write one buffer in the layout of packed q, k and v.

    Not if autograd records the call: results must not share memory. In graphs the strides of results are fixed.
    """
    return (
        dispatch.keeps_layout(backend)
        and not torch.is_grad_enabled()
        and 3 * q.nbytes >= layouts.WORTH_PACKING
        and layouts.are_packed(q, k, v)
    )


class _XfaBackward(torch.autograd.Function):
    """Its own backward applies autograd to the reference in the accumulate dtype: differentiable to any order."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, stats: Tensor,
        token_mask: Tensor | None, spec: Spec, packed: bool,
    ) -> Any:  # fmt: skip
        ctx.save_for_backward(dout, q, k, v, temperature, token_mask)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        kernel = below_autograd("xfa_backward", backend, dout, q, k, v, temperature)
        return kernel(dout, q, k, v, temperature, stats, token_mask, spec, packed)

    @staticmethod
    def backward(ctx: Any, ddqkv: Tensor | None, ddtemperature: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = (*((None,) * 3 if ddqkv is None else ddqkv.transpose(2, 3).unbind(0)), ddtemperature)
        *tensors, token_mask = ctx.saved_tensors
        function = partial(reference.xfa, **ctx.spec.of_xfa(), token_mask=token_mask)
        return None, *differentiated_again(function, tensors, grads), None, None, None, None


def differentiated_again(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of a backward, by autograd of the forward `function`.

    `tensors`: the backward's inputs, which are the gradient of the forward's output and the forward's inputs. `grads`:
    the gradients with respect to the backward's results. Returns the gradients with respect to `tensors`.
    """
    dtype = reference.accumulate_dtype(tensors[1].dtype)
    again = torch.is_grad_enabled()
    with torch.enable_grad(), autocast.disabled(tensors[1]):
        # new tensors to differentiate at, connected to the old ones in case the result is differentiated again
        points = [x.to(dtype).view_as(x) if x.requires_grad else x.detach().to(dtype) for x in tensors]
        dout, *inputs = (x if x.requires_grad else x.requires_grad_() for x in points)
        first = torch.autograd.grad(function(*inputs), inputs, dout, create_graph=True)
        pairs = [(x, g.to(dtype)) for x, g in zip(first, grads, strict=True) if g is not None]
        second = torch.autograd.grad(
            [x for x, _ in pairs], [dout, *inputs], [g for _, g in pairs], allow_unused=True, create_graph=again
        )
    return [None if g is None else g.to(x.dtype) for x, g in zip(tensors, second, strict=True)]


class _Gram(torch.autograd.Function):
    """da = b dG^T + 2 dssq_a a and db = a dG + 2 dssq_b b, each one channel_mix: differentiable to any order."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, a: Tensor, b: Tensor, symmetric: bool, token_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(a, b, token_mask)
        ctx.symmetric, ctx.backend = symmetric, backend
        result: tuple[Tensor, Tensor, Tensor] = below_autograd("gram", backend, a, b)(a, b, symmetric, token_mask)
        return result

    @staticmethod
    def backward(ctx: Any, dG: Tensor, dssq_a: Tensor, dssq_b: Tensor) -> tuple[Tensor | None, ...]:
        a, b, token_mask = ctx.saved_tensors
        a, b = (reference.masked(x, token_mask) for x in (a, b))
        mix, da, db = partial(channel_mix, ctx.backend), None, None
        if ctx.symmetric:
            da = mix(a, dG + dG.transpose(-2, -1), add=a, add_scale=2 * (dssq_a + dssq_b))
        else:
            _, a_wanted, b_wanted, *_ = ctx.needs_input_grad
            da = mix(b, dG, add=a, add_scale=2 * dssq_a) if a_wanted else None
            db = mix(a, dG.transpose(-2, -1), add=b, add_scale=2 * dssq_b) if b_wanted else None
        return None, da, db, None, None


class _ChannelMix(torch.autograd.Function):
    """dx = channel_mix(dy, weight^T) and dweight = gram(dy, x): differentiable to any order."""

    @staticmethod
    def forward(ctx: Any, backend: str, *operands: Tensor | None) -> Tensor:
        ctx.save_for_backward(*operands)
        ctx.backend = backend
        y: Tensor = below_autograd("channel_mix", backend, *operands)(*operands)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, add, add_scale, x2, weight2 = ctx.saved_tensors
        _, *needed = ctx.needs_input_grad
        dy = dy.transpose(1, 2)

        def of_tokens(weight: Tensor) -> Tensor:
            return channel_mix(ctx.backend, dy, weight.transpose(-2, -1))

        def of_weight(x: Tensor, weight: Tensor) -> Tensor:
            G: Tensor = call("gram", ctx.backend, (dy, x), False, None)[0]
            return G.to(weight.dtype)

        def of_vector(product: Tensor, vector: Tensor) -> Tensor:
            return product.sum(-2, dtype=reference.accumulate_dtype(dy.dtype)).to(vector.dtype)

        dadd = None
        if needed[3]:
            dadd = dy if add_scale is None else (dy * add_scale.unsqueeze(-2)).to(dy.dtype)
        return (
            None,
            of_tokens(weight) if needed[0] else None,
            of_weight(x, weight) if needed[1] else None,
            of_vector(dy, bias) if needed[2] else None,
            dadd,
            of_vector(dy.to(add_scale.dtype) * add, add_scale) if needed[4] else None,
            of_tokens(weight2) if needed[5] else None,
            of_weight(x2, weight2) if needed[6] else None,
        )


# --------------------------------------------------------------------------------------------------- kernels and fakes


def token_major(x: Tensor, features: Any) -> Tensor:
    B, H, N, _ = x.shape
    return x.new_empty((B, N, H, features))


def fake_results(like: Tensor, backend: str) -> layouts.Results:
    def empty(size: tuple[Any, ...], dtype: torch.dtype, order: tuple[int, ...] | None = None) -> Tensor:
        if order is None:
            return like.new_empty(size, dtype=dtype)
        return torch.empty_permuted(size, order, dtype=dtype, device=like.device)

    return layouts.Results(empty, dispatch.keeps_layout(backend))


def _fake_xfa_forward(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    B, H, D = q.shape[0], q.shape[1], q.shape[-1]
    out = fake_results(q, others[-1]).output(q, k, v)
    return out, q.new_empty((B, H, D * D + 2 * D), dtype=reference.accumulate_dtype(q.dtype))


def _fake_xfa_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, *others: Any) -> Any:
    *_, packed, backend = others
    return fake_results(q, backend).gradients(q, k, v, packed), torch.empty_like(
        temperature, memory_format=torch.contiguous_format
    )


def _fake_gram(a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, H, Da, Db = a.shape[0], a.shape[1], a.shape[-1], b.shape[-1]
    dtype = reference.accumulate_dtype(a.dtype)
    G, ssq_a, ssq_b = (a.new_empty(size, dtype=dtype) for size in ((B, H, Da, Db), (B, H, Da), (B, H, Db)))
    return G, ssq_a, ssq_b


def _fake_channel_mix(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return token_major(x, weight.shape[-2])


def register(
    op: str,
    fake: Any,
    function: type[torch.autograd.Function],
    tokens: tuple[str, ...] = (),
    composed: Callable[..., Any] | None = None,
) -> None:
    """Registers an op. `tokens`: names of the arguments that autocast casts.

    `composed` computes an op for which backends have no kernel, from the backend's name and the other arguments.
    """
    _functions[op] = function
    if composed is not None:
        _composed[op] = composed
    overload = getattr(_ops, op).default
    names = [argument.name for argument in overload._schema.arguments]

    def with_spec(args: tuple[Any, ...]) -> list[Any]:
        return [Spec.of_text(x) if name == "spec" else x for name, x in zip(names, args, strict=True)]

    def kernel(*args: Any) -> Any:
        *given, backend = with_spec(args)
        return _kernel(op, backend)(*given)

    def autograd(*args: Any) -> Any:
        if wants_grad(*args) or internals.forward_ad_is_on():
            *given, backend = with_spec(args)
            return function.apply(backend, *given)
        with internals.below_autograd():
            return overload(*args)

    def under_autocast(*args: Any) -> Any:
        given = dict(zip(names, args, strict=True))
        given |= zip(tokens, autocast.cast_tokens(*(given[name] for name in tokens)), strict=True)
        with internals.without_autocast_key():
            return overload(*given.values())

    library.impl(op, kernel, "CompositeExplicitAutograd")
    library.impl(op, autograd, "Autograd")
    if tokens:
        for key in ("AutocastCPU", "AutocastCUDA"):
            library.impl(op, under_autocast, key)
    torch.library.register_fake(add_op_namespace_prefix(op), fake, lib=library)


register("xfa_forward", _fake_xfa_forward, _Xfa, ("q", "k", "v"))
register("xfa_backward", _fake_xfa_backward, _XfaBackward)
register("gram", _fake_gram, _Gram, ("a", "b"))
register("channel_mix", _fake_channel_mix, _ChannelMix, ("x", "add", "x2"))
