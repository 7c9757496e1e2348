"""FLOP counts of the ops, for ``torch.utils.flop_counter`` (registered here) and fvcore (:func:`fvcore_handlers`).

Only matrix products are counted, in multiply-adds (MACs): fvcore counts a MAC as one FLOP, torch as two. Norms,
softmax, layer norm, biases and residuals are not counted.

    op                what is counted in MACs, B images, N tokens; H heads of D features; C features in, I = H D, O out
    xfa_forward       q^T k, A v                                      2 B N I D
    xfa_backward      gradients of A, v, q and k                      4 B N I D
    gram              a^T b; half of it and the diagonal if symmetric
    linear_attention_forward    phi(k)^T v, phi(q) S
    linear_attention_backward   gradients of S, v, phi(q) and phi(k)
    gram_and_sum      a^T b, for linear attention
    channel_mix       weight x, weight2 x2
    layer_forward     x^T x, half and the diagonal; M x               B N (C (C + 1) / 2 + C O), and per image
                      W_q S, W_k S, G, A W_v, W_o (A W_v)             B C I (2 C + 2 D + O)
    layer_backward    dy^T x, M^T dy, R x                             B N (2 C O + C^2), and per image
                      the algebra's derivative                        B C I (4 C + 5 D + 2 O)

For ``map="key_value"`` layers also multiply ``W_v S``. In the direct form of a layer, the projections are torch's and
counted by the counters themselves, as are the matrix products of the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from xformer_kernels import linear_ops, ops  # noqa: F401 - linear_ops defines an op
from xformer_kernels._ops import add_op_namespace_prefix
from xformer_kernels._ops import ops as _ops
from xformer_kernels.layer.ops import Choices, Operands, Saved
from xformer_kernels.spec import Spec

Shape = Any


def _xfa_forward(q: Shape, *_: Any) -> int:
    B, H, N, D = q
    return 2 * B * H * N * D * D


def _xfa_backward(dout: Shape, *_: Any) -> int:
    return 2 * _xfa_forward(dout)


def _linear_attention_forward(q: Shape, k: Shape, v: Shape, *_: Any) -> int:
    B, H, N, D = q
    return B * H * D * v[-1] * (N + k[-2])


def _gram(a: Shape, b: Shape, symmetric: bool, *_: Any) -> int:
    B, H, N, D = a
    return B * H * N * (D * (D + 1) // 2 if symmetric else D * b[-1])


def _channel_mix(
    x: Shape, weight: Shape, bias: Shape = None, add: Shape = None, add_scale: Shape = None, x2: Shape = None, *_: Any
) -> int:
    B, H, N, I = x  # noqa: E741
    return B * H * N * weight[-2] * (I + (0 if x2 is None else x2[-1]))


def _layer(o: Operands, spec: str) -> tuple[int, ...]:
    """B, N, C, I, D, O, and how many of q, k and v the Gram matrix and the norms need."""
    (B, N, C), (H, *_), (O, I) = o.x, o.temperature, o.proj_weight  # type: ignore[misc]  # noqa: E741
    return B, N, C, I, I // H, O, 3 if Spec.of_text(spec).map == "key_value" else 2


def _layer_forward(*args: Any) -> int:
    o, choices, _ = ops.records(args, Operands, Choices)
    B, N, C, I, D, O, rows = _layer(o, choices.spec)  # noqa: E741
    return B * (N * (C * (C + 1) // 2 + C * O) + C * I * (rows * C + 2 * D + O))


def _layer_backward(dy: Shape, *args: Any) -> int:
    o, _, choices, _ = ops.records(args, Operands, Saved, Choices)
    B, N, C, I, D, O, rows = _layer(o, choices.spec)  # noqa: E741
    return B * (N * (2 * C * O + C * C) + C * I * (2 * rows * C + 5 * D + 2 * O))


MACS: dict[str, Callable[..., int]] = {
    "xfa_forward": _xfa_forward,
    "xfa_backward": _xfa_backward,
    "linear_attention_forward": _linear_attention_forward,
    "linear_attention_backward": lambda dout, *inputs: 2 * _linear_attention_forward(*inputs),
    "gram": _gram,
    "gram_and_sum": lambda a, b, *_: _gram(a, b, False),
    "channel_mix": _channel_mix,
    "layer_forward": _layer_forward,
    "layer_backward": _layer_backward,
}
"""By op name, functions that compute the multiply-adds from the op's arguments, with shapes in place of tensors."""


def _register(op: str, macs: Callable[..., int]) -> None:
    def flops(*args: Any, out_shape: Any = None, **_: Any) -> int:
        return 2 * macs(*args)

    register_flop_formula(getattr(_ops, op))(flops)


for _op, _macs in MACS.items():
    _register(_op, _macs)


def fvcore_handlers() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """Handlers of the ops in a traced graph: ``FlopCountAnalysis(model, x).set_op_handle(**fvcore_handlers())``."""

    def handler(macs: Callable[..., int]) -> Callable[[list[Any], list[Any]], int]:
        return lambda inputs, outputs: macs(*map(_known, inputs))

    return {add_op_namespace_prefix(op): handler(macs) for op, macs in MACS.items()}


def _known(value: Any) -> Any:
    """The shape of a tensor in a traced graph, or the value of a constant."""
    sizes = value.type().sizes() if isinstance(value.type(), torch.TensorType) else None
    if sizes is not None:
        return sizes
    constant = value.toIValue()
    return constant.shape if isinstance(constant, torch.Tensor) else constant
