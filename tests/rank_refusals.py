"""Calls that every rank refuses, even if only one rank has a reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rank_cases import Case

import xformer_kernels as xk


@dataclass(frozen=True)
class Refusal:
    """A call that every rank refuses; `call` takes the rank, the number of ranks and the group of all ranks."""

    call: Callable[[int, int, Any], Any]
    types: tuple[type[Exception], ...]
    words: str
    """Part of the message of at least one rank, in lower case."""


def _differ(**other: Any) -> Callable[[int, int, Any], Any]:
    """A call in which the last rank has other arguments."""

    def call(rank: int, ranks: int, group: Any) -> Any:
        changes = dict(other) if rank == ranks - 1 else {}
        case = Case(**{"form": "auto", **changes.pop("case", {})})
        x, _, weights, _ = case.inputs()
        x = x[: changes.pop("B", case.B), :9]
        x = changes.pop("x", lambda x: x)(x)
        weights = changes.pop("weights", lambda w: w)(weights)
        return case.call(x, weights, group=group, **changes)

    return call


def _module(change: Callable[[torch.nn.Module], Any], block: bool, C: int = 24) -> Callable[[int, int, Any], Any]:
    """A call of a module that is changed on the last rank, whose tokens have C features."""

    def call(rank: int, ranks: int, group: Any) -> Any:
        module = (xk.XFABlock if block else xk.XFA)(24, 3)
        last = rank == ranks - 1
        if last:
            change(module)
        return module(torch.randn(1, 4, C if last else 24), group=group)

    return call


def _cuda_only(rank: int, ranks: int, group: Any) -> Any:
    return Case().call(*Case().inputs()[0:3:2], group=EXTRA["cuda"])


def _twice_backward(rank: int, ranks: int, group: Any) -> Any:
    case = Case()
    x, _, weights, _ = case.inputs()
    x.requires_grad_()
    (g,) = torch.autograd.grad(case.call(x, weights, group=group).square().sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), x)


VALUE, TYPE = (ValueError,), (TypeError,)
BOTH = (TypeError, ValueError)
EXTRA: dict[str, Any] = {}
REFUSALS = {
    "no group": Refusal(lambda r, n, g: Case().call(*Case().inputs()[0:3:2], group="world"), TYPE, "got str"),
    "backend of another device": Refusal(_cuda_only, VALUE, "for tensors on cuda, and x is on cpu"),
    "x elsewhere on one rank": Refusal(_differ(x=lambda x: x.to("meta")), VALUE, "x is on meta"),
    "no tensor on one rank": Refusal(_differ(x=lambda x: x.tolist()), BOTH, "x must be a torch.tensor"),
    "C": Refusal(_differ(case={"C": 30}), VALUE, "agree on c, and they do not: [24, "),
    "heads": Refusal(_differ(case={"H": 4}), VALUE, "agree on the number of heads, and they do not: [3, "),
    "B": Refusal(_differ(B=1), VALUE, "agree on the number of images b, and they do not: [2, "),
    "dtype": Refusal(_differ(case={"dtype": torch.bfloat16}), VALUE, "agree on dtype"),
    "map": Refusal(_differ(case={"map": "key_value"}), VALUE, "agree on map"),
    "activation": Refusal(_differ(case={"activation": "identity"}), VALUE, "agree on map, norm, activation"),
    "form": Refusal(_differ(case={"form": "direct"}), VALUE, "form"),
    "eps": Refusal(_differ(eps=1e-6), VALUE, "eps"),
    "dropout": Refusal(_differ(dropout_p=0.5), VALUE, "dropout_p"),
    "layer or block": Refusal(_differ(case={"block": True}), VALUE, "which weights are none"),
    "bias": Refusal(_differ(weights=lambda w: {**w, "qkv_bias": None}), VALUE, "which weights are none"),
    "gradients": Refusal(_differ(x=lambda x: x.requires_grad_()), VALUE, "which gradients are wanted"),
    "a shape on one rank": Refusal(
        _differ(weights=lambda w: {**w, "proj_weight": w["proj_weight"][:, 1:]}), VALUE, "proj_weight must have shape"
    ),
    "a mask on one rank": Refusal(_differ(token_mask=torch.ones(2, 3).bool()), VALUE, "token_mask must have shape"),
    "an unknown map on one rank": Refusal(_differ(case={"map": "key_query"}), VALUE, "map must be one of"),
    "C of a module": Refusal(_module(lambda m: None, False, 25), VALUE, "c = 25"),
    "C of a block": Refusal(_module(lambda m: None, True, 25), VALUE, "c = 25"),
    "hooks on one rank": Refusal(
        _module(lambda m: m.qkv.register_forward_hook(print), False), VALUE, "no plain torch.nn.linear"
    ),
    "Gram form, differentiated twice": Refusal(_twice_backward, (NotImplementedError,), "second derivatives"),
}
