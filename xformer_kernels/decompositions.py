"""Decompositions of the forward ops into PyTorch operators, for programs that run without this package.

``torch.onnx.export(..., dynamo=True)`` finds them in PyTorch's table. For other exporters, pass them explicitly::

    table = torch.export.default_decompositions() | xformer_kernels.decompositions()
    program = torch.export.export(model, args).run_decompositions(table)

``torch.compile`` does not use them: compiled graphs call the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xformer_kernels import linear_ops, ops, reference
from xformer_kernels import torch_internals as internals
from xformer_kernels._ops import ops as _ops
from xformer_kernels.layer import ops as layer_ops
from xformer_kernels.spec import Spec

_decompositions: dict[Any, Callable[..., Any]] = {}


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Implementations of the forward ops in PyTorch operators, by overload, for ``run_decompositions``.

    They compute the definitions in :mod:`xformer_kernels.reference`. Statistics that an op returns for its backward are
    filled with NaN.
    """
    return dict(_decompositions)


def _register(op: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        overload = getattr(_ops, op).default
        _decompositions[overload] = function
        internals.decompose_in_onnx(overload, function, fake)
        return function

    return register


def _not_computed(statistics: Tensor) -> Tensor:
    return torch.full_like(statistics, math.nan)


@_register("xfa_forward", ops._fake_xfa_forward)
def _xfa_forward(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, token_mask: Tensor | None, spec: str, backend: str
) -> tuple[Tensor, Tensor]:
    out = reference.xfa(q, k, v, temperature, **Spec.of_text(spec).of_xfa(), token_mask=token_mask)
    _, statistics = ops._fake_xfa_forward(q, k, v, "reference")
    return out.transpose(1, 2), _not_computed(statistics)


@_register("gram", ops._fake_gram)
def _gram(a: Tensor, b: Tensor, symmetric: bool, token_mask: Tensor | None, backend: str) -> tuple[Tensor, ...]:
    return reference.gram(a, b, symmetric=symmetric, token_mask=token_mask)


@_register("channel_mix", ops._fake_channel_mix)
def _channel_mix(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    *optional, _ = others
    names = ("bias", "add", "add_scale", "x2", "weight2")
    return reference.channel_mix(x, weight, **dict(zip(names, optional, strict=True))).transpose(1, 2)


@_register("linear_attention_forward", linear_ops._fake_forward)
def _linear_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, query_mask: Tensor | None, token_mask: Tensor | None, spec: str, backend: str
) -> tuple[Tensor, Tensor]:
    choices = Spec.of_text(spec).of_linear()
    out = reference.linear_attention(q, k, v, **choices, query_mask=query_mask, token_mask=token_mask)
    _, statistics = linear_ops._fake_forward(q, k, v, query_mask, token_mask, spec, "reference")
    return out.transpose(1, 2), _not_computed(statistics)


@_register("gram_and_sum", linear_ops._fake)
def _gram_and_sum(a: Tensor, b: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return reference.gram(a, b)[0], reference.column_sums(a, None)


@_register("layer_forward", layer_ops._fake_forward)
def _layer_forward(*args: Any) -> tuple[Tensor, ...]:
    o, (keep, token_mask, spec, ln_eps, residual, group, _) = ops.records(args, layer_ops.Operands)
    if group:
        raise NotImplementedError("a layer whose tokens are split over ranks (group=...) cannot be decomposed")
    choices = layer_ops.Choices(keep, token_mask, Spec.of_text(spec), ln_eps, residual, group)
    _, *statistics = layer_ops._fake_forward(*args)
    return layer_ops._reference(o, choices), *map(_not_computed, statistics)
