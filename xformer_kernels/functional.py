"""Public functions: each checks its arguments, selects a backend through dispatch and calls the op."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xformer_kernels import autocast, dispatch, ops, parallel, reference, repeated, validate
from xformer_kernels.spec import Spec


def xfa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    *,
    map: str = "query_key",
    norm: str = "token",
    activation: str = "softmax",
    eps: float = 1e-12,
    token_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    map_fn: Callable[[Tensor], Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross feature attention: attention between features, with a D x D map, linear in the number of tokens.

    ::

        norm="token"      q^[n,i] = q[n,i] / max(||q[:,i]||, eps)     one norm per feature, over the tokens (default)
        norm="feature"    q^[n,i] = q[n,i] / max(||q[n,:]||, eps)     one norm per token, over the features
        norm="none"       q^ = q                                      the map is scaled by the temperature only
        map="query_key"   A = act(temperature * q^T k^)               out[n,i] = sum_j A[i,j] v[n,j]     (default)
        map="key_value"   M = temperature * k^T v                     out[n,j] = sum_i q^[n,i] M[i,j]

    ``act`` is the softmax over the key features j, or the identity; it applies to ``map="query_key"`` only. The default
    is XCiT's XCA (arXiv 2106.09681), EdgeNeXt's cross-covariance attention (arXiv 2206.10589) and Restormer's MDTA
    (arXiv 2111.09881). Without norms, ``xfa(k, v, q, D**-0.5)`` is the channel attention of DaViT (arXiv 2204.03645),
    and ``xfa(q, k, v, N**-0.5)`` that of Florence-2's image encoder. ``key_value`` is our interpretation of the
    abstract of XFormer (arXiv 2207.07268), whose formula is not public. eps is applied as in
    :func:`torch.nn.functional.normalize`, including its gradient (a norm equal to eps counts as clamped, as it does
    since torch 2.14), but is raised to at least the smallest normal number of the accumulate dtype (1.2e-38 for
    float32).

    Args:
        q, k, v: (B, H, N, D), on the same device, with the same dtype: float32, float64, bfloat16 or float16. Any
            strides (views of a packed projection are read in place; in training, create them with :func:`split_qkv`).
        temperature: (H,), (H, 1, 1) or one element; any floating dtype; learnable.
        map, norm, activation, eps: see the formulas.
        token_mask: (B, N) bool. Tokens where it is False are ignored, whatever their values: their output and gradients
            are 0.
        dropout_p: probability in [0, 1) of dropping an entry of the map. Dropout is applied whenever it is above 0 (as
            in ``scaled_dot_product_attention``); the remaining entries are scaled by 1 / (1 - dropout_p).
        map_fn: replaces ``act`` (and, for ``key_value``, the identity): takes the scaled map (B, H, D, D), in the
            accumulate dtype, and returns A of the same shape.
        backend: "auto", or the name of a backend, see :func:`explain`. The environment variable
            ``XFORMER_KERNELS_BACKEND`` overrides "auto".

    Returns:
        (B, H, N, D) in the dtype of q: a view of (B, N, H, D) memory, so ``.transpose(1, 2).flatten(2)`` is free. The
        CPU kernels return a view of (B, H, D, N) memory if q, k and v are such views (images). Sums, norms and maps are
        float32 (float64 for float64); results are deterministic. On processors that multiply bfloat16 by bfloat16, the
        map is rounded to bfloat16 first. With autocast on, q, k and v are cast as for ``scaled_dot_product_attention``.

    If the temperature is float64 and the tokens are not, the usual type promotion applies: everything is computed in
    float64, on copies of the tokens, and the output is rounded to the dtype of the tokens.

    Differentiable to any order: first derivatives are computed by the kernels, higher ones through the reference. The
    transforms of ``torch.func``, forward-mode AD, and tensor subclasses that define ``__torch_dispatch__`` are only
    supported by PyTorch's own operators, so the reference computes them, whichever backend is requested. With
    ``map_fn`` or ``dropout_p`` the call is composed of :func:`gram`, the map and :func:`channel_mix`;
    ``norm="feature"`` is then computed in eager PyTorch.

    Raises:
        TypeError: an argument has an unsupported type or dtype.
        ValueError: an argument has an invalid shape, device or value; the backend is unknown.
        RuntimeError: the backend requested by name cannot serve the call; the message lists every reason.
    """
    if isinstance(q, Tensor):
        q, k, v = autocast.cast_tokens(q, k, v)  # type: ignore[assignment]
    signature = None
    if token_mask is None and map_fn is None:
        operands = (q, k, v, temperature)
        signature = repeated.signature(operands, "xfa", map, norm, activation, eps, dropout_p, backend)
        served = repeated.known(signature)
        if served is not None:
            operands = (q, k, v, temperature if temperature.dim() == 1 else temperature.reshape(-1))
            out: Tensor = ops.call("xfa_forward", served.backend, operands, None, served.spec, known_plain=True)[0]
            return out.transpose(1, 2)
    spec = Spec(map, norm, activation, eps).check()
    validate.xfa(q, k, v, temperature, token_mask, dropout_p, map_fn)
    per_head = of_heads(temperature, q.shape[1])
    arguments = Arguments(q, k, v, per_head, spec, token_mask, dropout_p, map_fn)
    keep = partial(repeated.remember, signature) if per_head.numel() == temperature.numel() else None
    return prepared(arguments, backend, keep)()[0].transpose(1, 2)


class Served(NamedTuple):
    """The backend whose single op computes a call of :func:`xfa`, and the spec for that op."""

    backend: str
    spec: Spec


class Arguments(NamedTuple):
    """The checked arguments of :func:`xfa`, with the temperature as (H,).

    It has methods, not properties: torch.compile of PyTorch 2.10 does not trace properties of a NamedTuple of tensors.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    temperature: Tensor
    spec: Spec
    token_mask: Tensor | None = None
    dropout_p: float = 0.0
    map_fn: Callable[[Tensor], Tensor] | None = None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v, self.temperature

    def fusible(self) -> bool:
        """Whether a single op can compute the call, if the backend supports the Spec; otherwise it is composed."""
        return self.map_fn is None and self.dropout_p == 0

    def promotes(self) -> bool:
        """Whether a float64 temperature promotes the tokens to float64."""
        return self.temperature.dtype is torch.float64 and self.q.dtype is not torch.float64


def prepared(
    a: Arguments, backend: str, keep: Callable[[Served], None] | None = None
) -> Callable[[], Sequence[Tensor]]:
    """A callable that computes :func:`xfa`; its first result is out (B, N, H, D).

    `keep` is called with what serves the call, if that is a single op.
    """
    if a.promotes():
        return partial(_rounded, a, backend)
    q, tensors, fusible = a.q, a.tensors(), a.fusible()
    first = dispatch.first_asked(q, a.spec) if fusible else None
    norm = a.spec.norm if fusible else None
    name = backend_of(backend, tensors, (q.dtype, a.temperature.dtype), head_dims(q), norm, first)
    spec = a.spec.with_normal_eps(reference.accumulate_dtype(q.dtype))
    if fusible and name != "reference" and dispatch.fuses(name, spec):
        if keep is not None:
            keep(Served(name, spec))
        return partial(ops.call, "xfa_forward", name, tensors, a.token_mask, spec)
    a = a._replace(spec=spec)
    return partial(_reference, a) if name == "reference" else partial(composed, a, name)


def _rounded(a: Arguments, backend: str) -> tuple[Tensor]:
    wide = a._replace(q=a.q.double(), k=a.k.double(), v=a.v.double())
    return (prepared(wide, backend)()[0].to(a.q.dtype),)


def _reference(a: Arguments) -> tuple[Tensor]:
    note_reference("xfa")
    map_fn = None if a.map_fn is None else _checked_result(a.map_fn)
    with autocast.disabled(a.q):
        out = reference.xfa(
            *a.tensors(), **a.spec.of_xfa(), token_mask=a.token_mask, dropout_p=a.dropout_p, map_fn=map_fn
        )
    return (out.transpose(1, 2),)


def gram(
    a: Tensor,
    b: Tensor,
    *,
    symmetric: bool = False,
    token_mask: Tensor | None = None,
    sums: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Gram matrix over the tokens, and the sum of squares of each feature, in one pass.

    ::

        G[i,j] = sum_n a[n,i] b[n,j]        ssq_a[i] = sum_n a[n,i]^2        ssq_b[j] = sum_n b[n,j]^2
                                            sum_a[i] = sum_n a[n,i]          sum_b[j] = sum_n b[n,j]

    Args:
        a, b: (B, H, N, Da) and (B, H, N, Db), or (B, N, Da) and (B, N, Db); dtypes, strides and device as in
            :func:`xfa`.
        symmetric: ``b`` is ``a`` itself: half the work, and G is bitwise symmetric.
        token_mask: (B, N) bool; tokens where it is False are ignored.
        sums: whether to also return the sum of each feature, computed by PyTorch's ``sum``.
        backend: see :func:`xfa`.

    Returns:
        G (B, H, Da, Db), ssq_a (B, H, Da), ssq_b (B, H, Db), and with ``sums`` sum_a (B, H, Da), sum_b (B, H, Db), in
        float32 (float64 for float64); without H for 3-D input. Differentiable to any order.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`xfa`; ValueError if ``symmetric`` and ``b`` is not ``a``.
    """
    if isinstance(a, Tensor):
        a, b = autocast.cast_tokens(a) * 2 if a is b else autocast.cast_tokens(a, b)  # type: ignore[assignment]
    signature = None
    if token_mask is None:
        signature = repeated.signature((a, b), "gram", a is b, symmetric, sums, backend)
    name = repeated.known(signature)
    if name is None:
        validate.gram(a, b, symmetric, token_mask)
        validate.boolean("sums", sums)
        name = backend_of(backend, (a, b), (a.dtype,), head_dims(a, b))
        repeated.remember(signature, name)
    single = a.dim() == 3
    if single:
        same = a is b
        a = a.unsqueeze(1)
        b = a if same else b.unsqueeze(1)
    if name == "reference":
        note_reference("gram")
        with autocast.disabled(a):
            result: tuple[Tensor, ...] = reference.gram(a, b, symmetric=symmetric, token_mask=token_mask)
    else:
        result = ops.call("gram", name, (a, b), bool(symmetric), token_mask, known_plain=signature is not None)
    if sums:
        sum_a = reference.column_sums(a, token_mask)
        result = (*result, sum_a, sum_a if a is b else reference.column_sums(b, token_mask))
    return tuple(t.squeeze(1) for t in result) if single else result


def channel_mix(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    add_scale: Tensor | None = None,
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multiplies every token by a small matrix per head, with optional additive terms, in one pass.

    ::

        y[n,o] = sum_i weight[o,i] x[n,i] + sum_i weight2[o,i] x2[n,i] + bias[o] + add_scale[o] * add[n,o]

    Args:
        x, x2: (B, H, N, I) and (B, H, N, I2), or (B, N, I) and (B, N, I2); dtypes, strides and device as in
            :func:`xfa`.
        weight, weight2: (..., O, I) and (..., O, I2), broadcast over batch and heads; in the dtype of x or in float32
            (float64 for float64).
        bias, add_scale: (..., O), broadcast likewise, in the same dtypes. Without add_scale, ``add`` is not scaled.
        add: (B, H, N, O), or (B, N, O), in the dtype of x.
        backend: see :func:`xfa`.

    Returns:
        y (B, H, N, O), a view of (B, N, H, O) memory, or (B, N, O); in the dtype of x, accumulated in float32
        (float64 for float64). Differentiable to any order.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`xfa`; ValueError if x2 is given without weight2 or add_scale
            without add.
    """
    if isinstance(x, Tensor):
        x, add, x2 = autocast.cast_tokens(x, add, x2)  # type: ignore[assignment]
        weight, bias, add_scale, weight2 = autocast.cast_weights(x, weight, bias, add_scale, weight2)
    given = (x, weight, bias, add, add_scale, x2, weight2)
    signature = repeated.signature(given, "channel_mix", backend)
    name = repeated.known(signature)
    if name is None:
        validate.channel_mix(*given)
    heads = x.shape[1] if x.dim() == 4 else 1
    O = weight.shape[-2]  # noqa: E741
    weight = _broadcast("weight", weight, x, heads, (O, x.shape[-1]))
    weight2 = None if x2 is None or weight2 is None else _broadcast("weight2", weight2, x, heads, (O, x2.shape[-1]))
    bias = None if bias is None else _broadcast("bias", bias, x, heads, (O,))
    add_scale = None if add_scale is None else _broadcast("add_scale", add_scale, x, heads, (O,))
    operands = (x, weight, bias, add, add_scale, x2, weight2)
    if name is None:
        dims = head_dims(x, weight, weight.transpose(-2, -1), x if x2 is None else x2)
        name = backend_of(backend, operands, (x.dtype,), dims)
        repeated.remember(signature, name)
    single = x.dim() == 3
    if single:
        x, add, x2 = (None if t is None else t.unsqueeze(1) for t in (x, add, x2))  # type: ignore[assignment]
    if name == "reference":
        note_reference("channel_mix")
        with autocast.disabled(x):
            y = reference.channel_mix(x, weight, bias=bias, add=add, add_scale=add_scale, x2=x2, weight2=weight2)
    else:
        operands = (x, weight, bias, add, add_scale, x2, weight2)
        y = ops.call("channel_mix", name, operands, known_plain=signature is not None).transpose(1, 2)
    return y.squeeze(1) if single else y


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    *,
    map: str = "query_key",
    norm: str = "token",
    activation: str = "softmax",
    eps: float = 1e-12,
    token_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    map_fn: Callable[[Tensor], Tensor] | None = None,
    backend: str = "auto",
) -> dispatch.Explanation:
    """Which backend would serve the same call of :func:`xfa`, and every reason why the others do not. Print the result.

    Computes nothing. Raises the same errors as :func:`xfa` for the same arguments.
    """
    spec = Spec(map, norm, activation, eps).check()
    if isinstance(q, Tensor):
        q, k, v = autocast.cast_tokens(q, k, v)  # type: ignore[assignment]
    validate.xfa(q, k, v, temperature, token_mask, dropout_p, map_fn)
    temperature = of_heads(temperature, q.shape[1])
    a = Arguments(q, k, v, temperature, spec, token_mask, dropout_p, map_fn)
    if ops.torch_only(*a.tensors()):
        return dispatch.explain_reference(backend, TORCH_ONLY)
    first = dispatch.first_asked(q, spec) if a.fusible() and not a.promotes() else None
    dtypes = (torch.float64 if a.promotes() else q.dtype, temperature.dtype)
    fused = norm if a.fusible() else None
    return dispatch.explain(backend, q.device.type, dtypes, head_dims(q), fused, first, {"q": q, "k": k, "v": v})


TORCH_ONLY = (
    "a transform of torch.func, forward-mode AD or a tensor subclass with a __torch_dispatch__ of its own, for which "
    "PyTorch's operators alone have rules"
)


def backend_of(
    asked: str,
    tensors: tuple[Tensor | None, ...],
    dtypes: tuple[torch.dtype, ...],
    dims: tuple[int, ...],
    norm: str | None = None,
    first: str | None = None,
) -> str:
    """The backend that serves a call; the reference if only torch's own operations support the tensors."""
    if ops.torch_only(*tensors):
        dispatch.check_name(asked)
        return "reference"
    device_type: str = tensors[0].device.type  # type: ignore[union-attr]
    return dispatch.choose(asked, device_type, dtypes, dims, norm, first)


def of_heads(temperature: Tensor, heads: int) -> Tensor:
    """A checked temperature as (H,)."""
    if temperature.dim() != 1:
        temperature = temperature.reshape(-1)
    return temperature if temperature.shape[0] == heads else shared(temperature, (heads,))


def shared(t: Tensor, shape: tuple[Any, ...]) -> Tensor:
    """`t` expanded to `shape`; its gradient is summed in the accumulate dtype and rounded once."""
    if t.requires_grad:
        t = t.to(reference.accumulate_dtype(t.dtype))
    return t.expand(shape)


def head_dims(*tensors: Tensor) -> tuple[int, ...]:
    """Numbers of features, for dispatch. Compiled graphs are specialised on these, but not on the number of tokens."""
    return tuple(operator.index(t.shape[-1]) for t in tensors)


def note_reference(op: str) -> None:
    if not torch.compiler.is_compiling():
        dispatch.note("reference", op)


def _broadcast(name: str, t: Tensor, x: Tensor, heads: Any, last: tuple[Any, ...]) -> Tensor:
    """A weight or vector of (..., *last) as (B, H, *last), without a copy."""
    full = (x.shape[0], heads, *last)
    if x.dim() == 3 and t.dim() == len(last) + 1:
        t = t.unsqueeze(1)
    try:
        return t if t.shape == full else shared(t, full)
    except RuntimeError:
        meaning = "(..., O, I)" if len(last) == 2 else "(..., O)"
        raise ValueError(
            f"{name} must have a shape {meaning} that broadcasts to (B, H, ...) = {full}, got {tuple(t.shape)}"
        ) from None


def _checked_result(map_fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def checked(S: Tensor) -> Tensor:
        A = map_fn(S)
        validate.tensor("the result of map_fn", A)
        validate.shape("the result of map_fn", A, S.shape, "that of its argument")
        return A

    return checked


def composed(a: Arguments, backend: str, group: Any = None) -> tuple[Tensor]:
    """out (B, N, H, D) from the two primitives, with the map between them computed in eager PyTorch.

    Tokens may be split over the ranks of a group.
    """
    spec, mask = a.spec, a.token_mask
    # v too: the Gram matrix of its gradient would read the values of masked tokens
    q, k, v = (reference.masked(x, mask) for x in (a.q, a.k, a.v))
    eps = spec.eps
    if spec.norm == "feature":
        # an eps that rounds to 0 in this dtype would give NaN for a zero norm
        eps = max(eps, torch.finfo(q.dtype).smallest_normal * torch.finfo(q.dtype).eps)
        q, k = F.normalize(q, dim=-1, eps=eps), F.normalize(k, dim=-1, eps=eps)
    of_qk = spec.map == "query_key"
    left, right = (q, k) if of_qk else (k, v)
    S, ssq_left, ssq_right = gram(left, right, backend=backend)
    if not of_qk and spec.norm == "token":
        ssq_right = q.to(S.dtype).square().sum(-2)
    S, ssq_left, ssq_right = parallel.differentiable_total(group, S, ssq_left, ssq_right)
    if spec.norm == "token":
        S = S / _norm(ssq_left, eps).unsqueeze(-1)
        if of_qk:
            S = S / _norm(ssq_right, eps).unsqueeze(-2)
        else:
            q = (q / _norm(ssq_right, eps).unsqueeze(-2)).to(q.dtype)
    S = S * a.temperature.to(S.dtype).view(-1, 1, 1)
    A = reference.activate(S, spec) if a.map_fn is None else _checked_result(a.map_fn)(S).to(S.dtype)
    if a.dropout_p:
        A = A * parallel.same(group, F.dropout(torch.ones_like(A), a.dropout_p))
    x, weight = (v, A) if of_qk else (q, A.transpose(-2, -1))
    out = channel_mix(x, weight, backend=backend)
    return (reference.masked(out, mask).transpose(1, 2),)


def _norm(ssq: Tensor, eps: float) -> Tensor:
    """max(sqrt(ssq), eps) with the gradient of F.normalize: 0 instead of NaN where ssq is 0."""
    zero = ssq == 0
    return torch.where(zero, 0, torch.where(zero, 1, ssq).sqrt()).clamp_min(eps)
