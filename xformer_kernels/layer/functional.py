"""The layer around xfa with its projections, and the block with layer norm, layer scale and residual, in two forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xformer_kernels import autocast, dispatch, functional, ops, parallel, reference, repeated
from xformer_kernels.inference import LayerNorm
from xformer_kernels.layer import cost
from xformer_kernels.layer.call import Call
from xformer_kernels.layer.ops import Choices, Operands
from xformer_kernels.packed import heads_of
from xformer_kernels.spec import Spec


def xfa_layer(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    temperature: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    map: str = "query_key",
    norm: str = "token",
    activation: str = "softmax",
    eps: float = 1e-12,
    token_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    form: str = "auto",
    group: Any = None,
    backend: str = "auto",
) -> Tensor:
    """Cross feature attention with its projections, computed in one of two mathematically equal forms.

    ::

        q, k, v = split(x qkv_weight^T + qkv_bias);    y = xfa(q, k, v, temperature) proj_weight^T + proj_bias

        form="direct"   projects, calls xfa, projects
        form="gram"     S = sum_n x x^T (C x C);  every map from S and the weights;  M = W_o A W_v;  y = M x + m

    The Gram form never computes q, k and v, neither in forward nor in backward: each is two passes over x with small
    matrix algebra in between, and x is the only tensor of size N that is saved. It takes about half the FLOPs if N is
    much larger than C, and more if N is smaller; ``"auto"`` compares the costs, see :func:`explain_layer`. A vector
    near the mean of the tokens is subtracted from x before summation, so that no precision is lost if the mean is much
    larger than the spread. If the projections cancel x's dominant components, rounding error grows quadratically
    compared with the direct form.

    Args:
        x: (B, N, C) tokens, float32, float64, bfloat16 or float16, of any strides.
        qkv_weight: (3 I, C): rows of q, then k, then v, with the I / H rows of each head adjacent, as in timm's
            ``XCA``.
        qkv_bias: (3 I,) or None.
        temperature: (H,) or (H, 1, 1); it determines the number of heads.
        proj_weight, proj_bias: (O, I), and (O,) or None.
        map, norm, activation, eps, dropout_p: as in :func:`xformer_kernels.xfa`.
        token_mask: (B, N) bool. Tokens where it is False are ignored by the attention: their output is proj_bias.
        form: "auto", "gram" or "direct". ``norm="feature"`` has no Gram form. In ``torch.export`` "auto" is "direct".
            On the CPU "auto" measures the machine once, and times both forms if their estimated costs are close: see
            :mod:`xformer_kernels.layer.calibration`. ``XFORMER_KERNELS_CALIBRATION=off`` disables the measurements.
        group: a ``torch.distributed.ProcessGroup`` over whose ranks the tokens of every image are split, evenly or not:
            see :mod:`xformer_kernels.parallel`. ``torch.compile`` breaks the graph at such a call.
        backend: as in :func:`xformer_kernels.xfa`.

    Weights have the dtype of x or its accumulate dtype (float32; float64 for float64). With autocast on, x, and weights
    of other dtypes, are cast as for ``torch.nn.functional.linear``.

    If the temperature is float64 and the tokens are not, the map is computed in float64 and the form is direct. The
    transforms of ``torch.func``, forward-mode AD, and tensor subclasses that define ``__torch_dispatch__`` (quantized
    weights) are only supported by PyTorch's own operators, which then compute the direct form.

    Returns:
        (B, N, O) in the dtype of x. Differentiable to any order, second and higher derivatives through the reference
        (with ``group`` and the Gram form, only once).

    Raises:
        TypeError, ValueError: an argument has an invalid type, shape, dtype, device or value; ``form="gram"`` if there
            is no Gram form; ranks that disagree.
        RuntimeError: the backend requested by name cannot serve the call.
    """
    call = Call(Spec(map, norm, activation, eps), token_mask, dropout_p, form, group, backend)
    return checked(call, Operands(x, qkv_weight, qkv_bias, temperature, proj_weight, proj_bias))()[0]


def xfa_block(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    ln_eps: float,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    temperature: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    layer_scale: Tensor | None = None,
    residual: bool = True,
    map: str = "query_key",
    norm: str = "token",
    activation: str = "softmax",
    eps: float = 1e-12,
    token_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    form: str = "auto",
    group: Any = None,
    backend: str = "auto",
) -> Tensor:
    """The half block ``x + layer_scale * xfa_layer(layer_norm(x))``, with :func:`xfa_layer`.

    In the Gram form, layer norm is applied while tokens are read, in both passes, and the residual is added while they
    are written: x is read twice and y written once. The layer norm's statistics are recomputed instead of saved.

    Args:
        ln_weight, ln_bias: (C,) or None, of the layer norm over the features of a token.
        ln_eps: added to the variance of the features, 0 or above.
        layer_scale: (O,) or None.
        residual: whether x is added; O must then equal C.
        Other arguments: as in :func:`xfa_layer`. With autocast on, x keeps its dtype.

    Returns:
        (B, N, O) in the dtype of x.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`xfa_layer`.
    """
    call = Call(Spec(map, norm, activation, eps), token_mask, dropout_p, form, group, backend)
    o = Operands(x, qkv_weight, qkv_bias, temperature, proj_weight, proj_bias, ln_weight, ln_bias, layer_scale)
    return checked(call, o, ln_eps, residual)()[0]


class LayerExplanation(NamedTuple):
    """Which form a layer takes, and the cost of both forms. Print it.

    ``gram`` and ``direct`` are estimates, see :mod:`xformer_kernels.layer.cost`. ``figures`` tells the source of the
    machine's figures, see :mod:`xformer_kernels.layer.calibration`. ``reason`` tells why the Gram form is ruled out
    regardless of its cost; empty if it is not. ``backend`` explains the backend of the chosen form.
    """

    form: str
    asked: str
    gram: cost.Cost
    direct: cost.Cost
    figures: str
    reason: str
    backend: dispatch.Explanation

    def __str__(self) -> str:
        lines = [f"form {self.form} (asked for: {self.asked})"]
        for name, price in (("gram", self.gram), ("direct", self.direct)):
            refused = f": not taken, {self.reason}" if name == "gram" and self.reason else ""
            lines.append(f"  {name}: {price}{refused}")
        return "\n".join((*lines, f"  figures: {self.figures}", str(self.backend)))


def explain_layer(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    temperature: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    map: str = "query_key",
    norm: str = "token",
    activation: str = "softmax",
    eps: float = 1e-12,
    token_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    form: str = "auto",
    group: Any = None,
    backend: str = "auto",
) -> LayerExplanation:
    """Which form and backend the same call of :func:`xfa_layer` would take, and the costs of both. Print the result.

    Computes and measures nothing: where the call would measure, "auto" uses the figures known so far. Does not
    communicate with a group: "auto" assumes that no other rank has more tokens. Raises the same errors as
    :func:`xfa_layer` for the same arguments.
    """
    call = Call(Spec(map, norm, activation, eps), token_mask, dropout_p, form, group, backend)
    o = _as_autocast(Operands(x, qkv_weight, qkv_bias, temperature, proj_weight, proj_bias))
    call.check(o)
    chosen = call.choose(o)
    dims = (x.shape[-1],) if chosen == "gram" else (proj_weight.shape[1] // temperature.numel(),)
    fused = None if chosen == "gram" else call.fused_norm()
    if ops.torch_only(*o):
        served = dispatch.explain_reference(backend, functional.TORCH_ONLY)
    else:
        served = dispatch.explain(backend, x.device.type, (x.dtype,), dims, fused, tokens={"x": x})
    return LayerExplanation(chosen, form, *call.costs(o), call.against_gram(o) if chosen == "direct" else "", served)


@dataclass
class Repeated:
    """What is kept for the signature of a call: its form, "auto" if the costs decide; and what serves the direct form's
    xfa, once that is known, if it is a single op."""

    form: str
    served: functional.Served | None = None

    def keep(self, served: functional.Served) -> None:
        self.served = served


def checked(call: Call, o: Operands, *block: Any) -> Callable[[], Sequence[Tensor]]:
    """A callable that computes a layer, or a half block if ln_eps and residual are given; its first result is y.

    Checks the arguments, unless the call repeats an earlier one.
    """
    signature = None
    if isinstance(o.x, Tensor) and autocast.is_on(o.x):
        o = _as_autocast(o, *block)
    else:
        signature = call.signature(o, *block)
    if call.group is not None:
        return partial(among_ranks, call, o, *block)
    repeat: Repeated | None = repeated.known(signature)
    if repeat is None:
        call.check(o, *block)
        form = call.fixed_form(o)
        if signature is not None:
            repeat = Repeated(form)
            repeated.remember(signature, repeat)
    else:
        form = repeat.form
    if form == "auto":
        form = call.cheaper_form(o, run=(checked, *block))
    return in_form(form, call, o, *block, repeat=repeat)


@parallel.outside_graphs
def among_ranks(call: Call, o: Operands, *block: Any) -> Sequence[Tensor]:
    """A layer or half block whose tokens are split over the ranks of the call's group."""
    with parallel.together(call.group, o.x) as ranks:
        call.check(o, *block)
        call.tell(ranks, o, *block)
    return in_form(call.agreed(ranks, o).form, call, o, *block)()


def in_form(
    form: str,
    call: Call,
    o: Operands,
    ln_eps: float | None = None,
    residual: bool = False,
    *,
    repeat: Repeated | None = None,
) -> Callable[[], Sequence[Tensor]]:
    """The callable of :func:`checked` for a form, "gram" or "direct". `repeat`: None unless in plain eager mode."""
    ln_eps, residual = None if ln_eps is None else float(ln_eps), bool(residual)
    o = o._replace(temperature=o.temperature.reshape(-1))
    if form == "direct":
        return partial(_direct, call, o, ln_eps, residual, repeat)
    x, dtype, keep = o.x, reference.accumulate_dtype(o.x.dtype), None
    backend = dispatch.choose(call.backend, x.device.type, (x.dtype,), functional.head_dims(x))
    if call.dropout_p:
        H = o.temperature.shape[0]
        D = o.proj_weight.shape[1] // H
        kept = F.dropout(x.new_ones((x.shape[0], H, D, D), dtype=dtype), call.dropout_p)
        keep = parallel.same(call.group, kept)
    spec, group = call.spec.with_normal_eps(dtype), parallel.name(call.group)
    choices = Choices(keep, call.token_mask, spec, ln_eps, residual, group)
    return partial(ops.call, "layer_forward", backend, o, *choices, known_plain=repeat is not None)


def _direct(call: Call, o: Operands, ln_eps: float | None, residual: bool, repeat: Repeated | None) -> tuple[Tensor]:
    x, u = o.x, o.x
    if call.token_mask is not None:  # otherwise the gradients of the weights would read the values of masked tokens
        # features that differ, since layer norm with an eps of 0 would divide by zero for equal ones
        instead: Any = 0 if ln_eps is None else torch.arange(x.shape[-1], device=x.device).remainder(2).to(x.dtype)
        u = torch.where(call.token_mask.unsqueeze(-1), x, instead)
    norm = LayerNorm(_as(o.ln_weight, x), _as(o.ln_bias, x), ln_eps) if ln_eps is not None else None
    qkv = _linear(u, _as(o.qkv_weight, u), _as(o.qkv_bias, u), layer_norm=norm)
    q, k, v = heads_of(qkv, o.temperature.shape[0])
    out = _attention(call, q, k, v, o.temperature, repeat).flatten(2)
    add = x if residual and o.layer_scale is None and out.dtype == x.dtype else None
    y = _linear(out, _as(o.proj_weight, out), _as(o.proj_bias, out), add=add)
    if o.layer_scale is not None:
        y = y * _as(o.layer_scale, y)
    return (y if add is not None or not residual else _as(x + y, x),)


def _attention(call: Call, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, repeat: Repeated | None) -> Tensor:
    """xfa of the direct form, as (B, N, H, D)."""
    if repeat is not None and (served := repeat.served) is not None:
        operands = (q, k, v, temperature)
        out: Tensor = ops.call("xfa_forward", served.backend, operands, None, served.spec, known_plain=True)[0]
        return out
    attention = functional.Arguments(q, k, v, temperature, call.spec, call.token_mask, call.dropout_p)
    if call.group is None:
        return functional.prepared(attention, call.backend, None if repeat is None else repeat.keep)()[0]
    backend = dispatch.choose(call.backend, q.device.type, (q.dtype, temperature.dtype), functional.head_dims(q))
    return functional.composed(attention, backend, call.group)[0]


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    layer_norm: LayerNorm | None = None,
    add: Tensor | None = None,
) -> Tensor:
    if layer_norm is not None:
        x = F.layer_norm(x, x.shape[-1:], *layer_norm)
    y = F.linear(x, weight, bias)
    return y if add is None else add + y


def _as_autocast(o: Operands, *block: Any) -> Operands:
    """With autocast on, casts the weights as torch's layers do, and x of a layer, but not that of a half `block`.

    The temperature may have any dtype.
    """
    if not isinstance(o.x, Tensor) or not autocast.is_on(o.x):
        return o
    x: Any = o.x if block else autocast.cast_tokens(o.x)[0]
    weights = dict(o._asdict(), x=None, temperature=None)
    cast = dict(zip(weights, autocast.cast_weights(x, *weights.values()), strict=True))
    return Operands(**dict(cast, x=x, temperature=o.temperature))


def _as(t: Any, x: Tensor) -> Any:
    return t if t is None or t.dtype == x.dtype else t.to(x.dtype)
